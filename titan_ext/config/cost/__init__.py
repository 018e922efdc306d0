"""What a configuration will cost: parameters, memory of a rank and bytes between sites, by formula."""
