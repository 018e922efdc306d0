"""Other people's tests and implementations beside ours (``titan-ext bench conformance``)."""
