"""A bit that flips in a checkpoint's tensors is found, by whichever rank reads that part."""

import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_ext.trainer.stored_bytes import broken_part


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"layer{place}": torch.randn(64, 8) for place in range(5)} | {"step": 3, "text": "settings"}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    return tmp_path / "step-1"


def test_what_was_written_is_sound(checkpoint):
    assert [broken_part(str(checkpoint), share, 3) for share in range(3)] == [None] * 3


@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_is_found_by_one_rank(seed, checkpoint):
    draw = random.Random(seed)
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    stored = dcp.FileSystemReader(checkpoint).read_metadata().storage_data.items()
    part = draw.choice([part for index, part in stored if index.fqn.startswith("layer")])
    # The tensor's own bytes lie in the middle of what is stored of it.
    data[part.offset + part.length // 2 + draw.randrange(-64, 64)] ^= 1 << draw.randrange(8)
    shard.write_bytes(data)
    found = [broken_part(str(checkpoint), share, 3) for share in range(3)]
    assert sum(each is not None for each in found) == 1
    assert next(filter(None, found)).startswith(f"{shard.name} is damaged (checksum, at byte {part.offset}")


@pytest.mark.parametrize("part", [0, 1])
def test_a_page_of_zeros_or_another_file_is_found(part, checkpoint):
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[part * 4096 : part * 4096 + 2048] = bytes(2048)
    shard.write_bytes(data)
    assert broken_part(str(checkpoint), 0, 1) is not None
