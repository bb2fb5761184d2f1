"""Finding checkpoints, refusing bad ones with one clear line, and making them up."""

import json
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import msgspec
import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import checkpoints
from pipeline.checkpoints import find, quality_of, synthesize
from pipeline.errors import CheckpointError
from pipeline.headers import Table, Tensor, encode_header, read_header
from pipeline.layout import (
    CONFIG_FILE,
    FULL_MIMI,
    MIMI_BYTES,
    MIMI_FILE,
    OFFICIAL,
    QUALITIES,
    TOKENIZER_FILE,
    ModelConfig,
    mimi_table,
    model_table,
)
from pipeline.synthesis import SIZES, tokenizer
from tests.helpers import refusal

Q4_FILE = QUALITIES["q4"].file
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4805508736\n"
OFFICIAL_CONFIG = msgspec.convert(dict(OFFICIAL), ModelConfig)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each quality, not to be written to."""
    folders = {quality: tmp_path_factory.mktemp(quality) for quality in QUALITIES}
    for quality, folder in folders.items():
        synthesize(folder, quality, "tiny")
    return folders


@pytest.fixture
def folder(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny q4 checkpoint to damage."""
    return Path(shutil.copytree(originals["q4"], tmp_path / "checkpoint"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache; whoever reaches for the network fails."""

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("find() used the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tensors(path: Path, table: Table) -> None:
    """A safetensors file of zeros."""
    header = encode_header(table)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in table.values()))


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def download(cache: Path, repo: str, source: Path) -> Path:
    """Put a folder's files into the download cache, as if they had been downloaded."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abc")
    return Path(shutil.copytree(source, root / "snapshots" / "0123abc"))


class TestTables:
    @pytest.mark.parametrize("quality", QUALITIES)
    def test_sizes_are_the_official_files(self, quality: str) -> None:
        table = model_table(OFFICIAL_CONFIG, quality)
        assert sum(tensor.nbytes for tensor in table.values()) == QUALITIES[quality].model_bytes

    def test_published_sizes(self) -> None:
        assert {quality: entry.model_bytes for quality, entry in QUALITIES.items()} == {
            "q4": 4_805_385_728,
            "q8": 8_168_645_376,
            "bf16": 15_375_630_336,
        }

    def test_mimi_is_the_official_file_to_the_byte(self, tmp_path: Path) -> None:
        table = mimi_table(FULL_MIMI)
        assert len(table) == 318
        write_tensors(tmp_path / "mimi", dict(sorted(table.items())))
        assert (tmp_path / "mimi").stat().st_size == MIMI_BYTES

    def test_a_7b_folder_is_found_by_its_headers_alone(self, tmp_path: Path) -> None:
        (tmp_path / CONFIG_FILE).write_text(json.dumps(dict(OFFICIAL)))
        write_tensors(tmp_path / Q4_FILE, model_table(OFFICIAL_CONFIG, "q4"))
        write_tensors(tmp_path / MIMI_FILE, mimi_table(FULL_MIMI))
        (tmp_path / TOKENIZER_FILE).write_bytes(b"pieces")
        found = find(str(tmp_path))
        assert (found.bits, found.group, found.mimi_shape) == (4, 32, FULL_MIMI)


class TestFind:
    @pytest.mark.parametrize("quality", QUALITIES)
    def test_a_folder(self, originals: dict[str, Path], quality: str) -> None:
        found = find(str(originals[quality]), quality)
        entry = QUALITIES[quality]
        assert (found.bits, found.group, found.quality) == (entry.bits, entry.group, quality)
        assert (found.model_file, found.mimi_file, found.tokenizer_file) == tuple(
            originals[quality] / name for name in (entry.file, MIMI_FILE, TOKENIZER_FILE)
        )
        assert found.mimi_shape == SIZES["tiny"].mimi
        assert found.config["dim"] == SIZES["tiny"].config["dim"]

    def test_a_file_under_the_name_that_the_config_gives(self, folder: Path) -> None:
        (folder / Q4_FILE).rename(folder / "tuned.safetensors")
        edit_config(folder, moshi_name="tuned.safetensors")
        assert find(str(folder)).model_file == folder / "tuned.safetensors"

    def test_a_downloaded_repository(self, originals: dict[str, Path], cache: Path) -> None:
        snapshot = download(cache, "kyutai/moshiko-mlx-q4", originals["q4"])
        assert find().folder == snapshot
        assert find("kyutai/moshiko-mlx-q4").folder == snapshot

    def test_without_a_config_the_official_one_holds(self, folder: Path) -> None:
        (folder / CONFIG_FILE).unlink()
        assert "expected U32 [32001, 512]" in refusal(lambda: find(str(folder)))

    @pytest.mark.parametrize(
        ("quality", "size"),
        [("q4", "5.2 GB"), ("q8", "8.6 GB"), ("bf16", "15.8 GB")],
    )
    def test_not_downloaded(self, cache: Path, quality: str, size: str) -> None:
        repo = QUALITIES[quality].repo
        expected = f"{repo} is not downloaded ({size}), run: pipeline models pull {repo}"
        assert refusal(lambda: find(None, quality)) == expected

    def test_an_unofficial_repository_not_downloaded(self, cache: Path) -> None:
        expected = "someone/moshi is not downloaded, run: pipeline models pull someone/moshi"
        assert refusal(lambda: find("someone/moshi")) == expected

    def test_partly_downloaded(self, originals: dict[str, Path], cache: Path) -> None:
        snapshot = download(cache, "kyutai/moshiko-mlx-q4", originals["q4"])
        (snapshot / Q4_FILE).unlink()
        line = refusal(find)
        assert "only partly downloaded (5.2 GB), run: pipeline models pull kyutai/moshiko-mlx-q4" in line
        assert f"no {Q4_FILE}" in line

    def test_a_repository_of_another_quality(self, cache: Path) -> None:
        assert refusal(lambda: find("kyutai/moshika-mlx-q8", "q4")) == (
            "kyutai/moshika-mlx-q8 holds q8: use --quality q8, or --model kyutai/moshika-mlx-q4"
        )

    @pytest.mark.parametrize(
        "model", ["./nowhere", "/nowhere", "nowhere", "a/b/c", "-", "", "some--one/moshi", "a..b/c"]
    )
    def test_neither_folder_nor_repository(self, model: str) -> None:
        assert "neither a folder nor a repository" in refusal(lambda: find(model))

    @pytest.mark.parametrize("quality", QUALITIES)
    def test_a_voice_by_its_name(self, originals: dict[str, Path], cache: Path, quality: str) -> None:
        snapshot = download(cache, f"kyutai/moshika-mlx-{quality}", originals[quality])
        assert find("moshika", quality).folder == snapshot
        assert "kyutai/moshiko-mlx" in refusal(lambda: find("moshiko", quality))

    def test_the_quality_of_what_is_there(self, originals: dict[str, Path], cache: Path) -> None:
        for quality, folder in originals.items():
            assert quality_of(str(folder)) == quality
            assert quality_of(f"kyutai/moshika-mlx-{quality}") == quality
        download(cache, "someone/moshi", originals["q8"])
        assert quality_of("someone/moshi") == "q8"
        assert [quality_of(model) for model in (None, "moshika", "nowhere", str(cache))] == ["q4"] * 4

    @pytest.mark.parametrize(("key", "name"), [("mimi_name", MIMI_FILE), ("tokenizer_name", TOKENIZER_FILE)])
    def test_an_official_name_where_the_one_that_the_config_gives_is_not(
        self, folder: Path, key: str, name: str
    ) -> None:
        edit_config(folder, **{key: "another"})
        found = find(str(folder))
        assert name in (found.mimi_file.name, found.tokenizer_file.name)

    def test_the_name_that_the_config_gives_goes_first(self, folder: Path) -> None:
        (folder / "mimi.safetensors").write_bytes((folder / MIMI_FILE).read_bytes())
        (folder / MIMI_FILE).write_bytes(b"another")
        edit_config(folder, mimi_name="mimi.safetensors")
        assert find(str(folder)).mimi_file == folder / "mimi.safetensors"

    def test_unknown_quality(self) -> None:
        assert refusal(lambda: find(None, "q5")) == "quality 'q5' is unknown: expected q4, q8, bf16"

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        line = refusal(lambda: find(str(tmp_path)))
        assert line.startswith(f"{tmp_path} is no checkpoint: no {Q4_FILE}, no {MIMI_FILE}, no {TOKENIZER_FILE}")

    @pytest.mark.parametrize("name", [Q4_FILE, MIMI_FILE, TOKENIZER_FILE])
    def test_one_file_missing(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        assert refusal(lambda: find(str(folder))) == f"{folder} is no checkpoint: no {name} in {folder}"

    def test_a_folder_of_another_quality(self, originals: dict[str, Path]) -> None:
        folder = originals["q8"]
        line = refusal(lambda: find(str(folder)))
        assert "is q8 (8 bit, groups of 64), not q4 (4 bit, groups of 32): use --quality q8, or" in line

    def test_a_folder_of_another_quality_whose_config_names_no_file(
        self, originals: dict[str, Path], tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(originals["q8"], tmp_path / "q8"))
        edit_config(folder, moshi_name=None)
        assert refusal(lambda: find(str(folder))) == (
            f"{folder} holds q8 (model.q8.safetensors), not q4: use --quality q8, or --model kyutai/moshiko-mlx-q4"
        )


class TestConfig:
    def test_not_json(self, folder: Path) -> None:
        (folder / CONFIG_FILE).write_text("dim = 4096")
        assert "is not a JSON object" in refusal(lambda: find(str(folder)))

    def test_a_key_missing(self, folder: Path) -> None:
        raw = json.loads((folder / CONFIG_FILE).read_text())
        del raw["dep_q"]
        (folder / CONFIG_FILE).write_text(json.dumps(raw))
        assert "missing required field `dep_q`" in refusal(lambda: find(str(folder)))

    def test_a_key_that_is_there_twice(self, folder: Path) -> None:
        (folder / CONFIG_FILE).write_text('{"dim": 256, "dim": 512}')
        assert "'dim' is there twice" in refusal(lambda: find(str(folder)))

    @pytest.mark.parametrize("key", ["quantization", "quantization_config"])
    def test_a_config_that_speaks_of_quantization(self, originals: dict[str, Path], tmp_path: Path, key: str) -> None:
        for quality, entry in QUALITIES.items():
            folder = Path(shutil.copytree(originals[quality], tmp_path / quality))
            edit_config(folder, **{key: {"bits": entry.bits, "group_size": entry.group, "mode": "affine"}})
            assert find(str(folder), quality).bits == entry.bits
            edit_config(folder, **{key: {"bits": 6, "group_size": 64}})
            assert refusal(lambda: find(str(folder), quality)).endswith(  # noqa: B023
                f" by its header, but config.json's {key} says 6 bit, groups of 64"
            )

    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"dim": "4096"}, "Expected `int`, got `str`"),
            ({"num_layers": 0}, "Expected `int` >= 1"),
            ({"delays": [0, 1]}, "dep_q 8, n_q 16 and 2 delays"),
            ({"num_heads": 7}, "found 256 with 7"),
            ({"demux_second_stream": True}, "not of a dialogue model: it sets demux_second_stream"),
            ({"conditioners": {"cfg": {}}}, "not of a dialogue model: it sets conditioners"),
            ({"cross_attention": True}, "it sets cross_attention"),
            ({"extra_heads_num_heads": 4}, "it sets extra_heads_num_heads"),
            ({"layer_scale": 0.01}, "it sets layer_scale"),
            ({"n_q": 8, "dep_q": 8, "delays": [0] * 9}, "expected dep_q < n_q"),
            ({"delays": [2] + [0] * 16}, "delays begins with 2, expected 0: the text is not delayed"),
            ({"causal": False}, "causal is False, expected True"),
            ({"gating": "gelu"}, "gating is 'gelu', expected 'silu'"),
            ({"norm": "layer_norm"}, "norm is 'layer_norm', expected 'rms_norm' or 'rms_norm_f32'"),
            ({"positional_embedding": "sin"}, "positional_embedding is 'sin', expected 'rope' or 'none'"),
            ({"mimi_name": "hf://kyutai/mimi/a"}, "mimi_name is 'hf://kyutai/mimi/a', expected the name of a file"),
            ({"moshi_name": "../a"}, "moshi_name is '../a', expected the name of a file beside it"),
            ({"tokenizer_name": "/etc/hosts"}, "tokenizer_name is '/etc/hosts', expected"),
            # A layer has four matrices in three parts each, and two norms.
            ({"num_layers": 3}, "14 missing (transformer.layers.2.gating.linear_in.biases)"),
            ({"num_layers": 1}, "14 unknown (transformer.layers.1.gating.linear_in.biases)"),
            ({"text_card": 999}, "of another shape (text_emb.weight: U32 [1001, 32], expected U32 [1000, 32])"),
            ({"card": 1024}, "of another shape"),
        ],
    )
    def test_a_config_that_does_not_fit(self, folder: Path, changes: dict[str, Any], line: str) -> None:
        edit_config(folder, **changes)
        assert line in refusal(lambda: find(str(folder)))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def truncate_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def overwrite(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def foreign_header(content: bytes) -> Callable[[Path], object]:
    return overwrite(struct.pack("<Q", len(content)) + content)


def spans(**tensors: tuple[int, int]) -> bytes:
    """A header with tensors of bytes at these offsets."""
    entries = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": (a, b)} for name, (a, b) in tensors.items()}
    return msgspec.json.encode(entries)


class TestFiles:
    @pytest.mark.parametrize("name", [Q4_FILE, MIMI_FILE])
    @pytest.mark.parametrize(
        ("damage", "line"),
        [
            (truncate, r"is truncated: \d+ bytes, its header asks for \d+; download it again"),
            (truncate_header, r"is truncated: 100 bytes, its header alone asks for \d+"),
            (lengthen, r"is too long: \d+ bytes, its header asks for \d+"),
            (overwrite(POINTER), r"is a git-lfs pointer, .*: run git lfs pull"),
            (overwrite(b"<!DOCTYPE html>\n<html>Access denied</html>"), r"text that begins '<!DOCTYPE html>"),
            (overwrite(b""), r"is not a safetensors file: expected one, found 0 bytes"),
            (overwrite(b"abc"), r"found 3 bytes of text that begins 'abc'"),
            (overwrite(b"\x93NUMPY\x01\x00v\x00" + bytes(100)), r"found 110 bytes of something else"),
            (foreign_header(b"not json"), r"its header does not parse"),
            (foreign_header(b'{"a": 1}'), r"its header does not parse"),
            (foreign_header(b'{"a":{"dtype":"Q3","shape":[1],"data_offsets":[0,1]}}'), r"a is of unknown type Q3"),
            (foreign_header(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}'), r"is damaged: a has 1 bytes"),
            (foreign_header(b"{}"), r"is not a (Moshi model|Mimi codec)"),
            (foreign_header(b"[" * 100_000), r"its header does not parse \(it is nested too deep\)"),
            (foreign_header(b'{"a":NaN}'), r"its header does not parse \(expected a number, found NaN\)"),
            (foreign_header(spans(a=(0, 4), b=(2, 6))), r"b begins at byte 2, expected 4: it overlaps the one before"),
            (foreign_header(spans(a=(0, 4), b=(5, 9))), r"b begins at byte 5, expected 4: it leaves a gap before it"),
            (foreign_header(spans(a=(1, 5))), r"a begins at byte 1, expected 0: it leaves a gap before it"),
            (foreign_header(spans(a=(0, 4))[:-1] + b"," + spans(a=(4, 8))[1:]), r"\('a' is there twice\)"),
        ],
    )
    def test_damage_is_one_line(self, folder: Path, name: str, damage: Callable[[Path], object], line: str) -> None:
        damage(folder / name)
        found = refusal(lambda: find(str(folder)))
        assert str(folder / name) in found
        assert re.search(line, found), found

    def test_a_tokenizer_that_is_a_pointer(self, folder: Path) -> None:
        (folder / TOKENIZER_FILE).write_bytes(POINTER)
        assert f"{folder / TOKENIZER_FILE} is a git-lfs pointer" in refusal(lambda: find(str(folder)))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert (
            refusal(lambda: read_header(tmp_path / "x"))
            == f"{tmp_path / 'x'} cannot be read: No such file or directory"
        )

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    @given(st.binary(max_size=200), st.booleans())
    def test_no_content_gets_past_the_one_line(self, tmp_path: Path, content: bytes, headed: bool) -> None:
        path = tmp_path / "any"
        path.write_bytes(struct.pack("<Q", len(content)) + content if headed else content)
        try:
            read_header(path)
        except CheckpointError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1

    @pytest.mark.parametrize(("found", "asked"), [("bf16", "q4"), ("q8", "q4"), ("q4", "q8"), ("q4", "bf16")])
    def test_a_file_with_the_wrong_label(
        self, originals: dict[str, Path], tmp_path: Path, found: str, asked: str
    ) -> None:
        folder = Path(shutil.copytree(originals[found], tmp_path / "mislabelled"))
        (folder / QUALITIES[found].file).rename(folder / QUALITIES[asked].file)
        assert refusal(lambda: find(str(folder), asked)) == (
            f"{folder / QUALITIES[asked].file} is {found} ({QUALITIES[found]}), not {asked} ({QUALITIES[asked]}): "
            f"use --quality {found}, or --model {QUALITIES[asked].repo}"
        )

    def test_an_unknown_quality_of_quantization(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE)
        table[f"{checkpoints.PROBE}.scales"] = Tensor("BF16", (768, 4))
        write_tensors(folder / Q4_FILE, table)
        assert "is 4 bit, groups of 64; expected q4" in refusal(lambda: find(str(folder)))

    def test_float32_weights(self, originals: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(originals["bf16"], tmp_path / "f32"))
        path = folder / QUALITIES["bf16"].file
        write_tensors(path, {name: Tensor("F32", tensor.shape) for name, tensor in read_header(path).items()})
        assert refusal(lambda: find(str(folder), "bf16")) == (
            f"{path} holds F32 weights, expected BF16: use --model kyutai/moshiko-mlx-bf16"
        )

    def test_pytorch_layout(self, folder: Path) -> None:
        write_tensors(folder / Q4_FILE, {"out_norm.alpha": Tensor("BF16", (1, 1, 4096))})
        assert "is in PyTorch's layout, expected MLX's" in refusal(lambda: find(str(folder)))

    def test_one_layer_that_is_not_quantized(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE)
        name = "transformer.layers.1.self_attn.out_proj"
        del table[f"{name}.scales"], table[f"{name}.biases"]
        table[f"{name}.weight"] = Tensor("BF16", (256, 256))
        write_tensors(folder / Q4_FILE, table)
        assert refusal(lambda: find(str(folder))).endswith(
            f"2 missing ({name}.biases), 1 of another shape ({name}.weight: BF16 [256, 256], expected U32 [256, 32])"
        )

    def test_one_layer_that_is_quantized(self, originals: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(originals["bf16"], tmp_path / "mixed"))
        path, name = folder / QUALITIES["bf16"].file, "transformer.layers.1.self_attn.out_proj"
        table = read_header(path) | {f"{name}.weight": Tensor("U32", (256, 32))}
        table |= {f"{name}.{part}": Tensor("BF16", (256, 8)) for part in ("scales", "biases")}
        write_tensors(path, table)
        line = refusal(lambda: find(str(folder), "bf16"))
        assert f"2 unknown ({name}.biases), 1 of another shape ({name}.weight: U32 [256, 32]" in line

    def test_scales_without_biases(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE)
        biases = [name for name in table if name.endswith(".biases")]
        write_tensors(folder / Q4_FILE, {name: tensor for name, tensor in table.items() if name not in biases})
        assert f"{len(biases)} missing ({min(biases)})" in refusal(lambda: find(str(folder)))

    def test_packed_weights_without_scales(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE)
        del table[f"{checkpoints.PROBE}.scales"]
        write_tensors(folder / Q4_FILE, table)
        assert "in_proj is quantized, and has no transformer.layers.0" in refusal(lambda: find(str(folder)))

    def test_packed_weights_of_no_whole_number_of_bits(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE) | {f"{checkpoints.PROBE}.weight": Tensor("U32", (768, 33))}
        write_tensors(folder / Q4_FILE, table)
        assert "33 packed columns and 8 groups, of which no whole number" in refusal(lambda: find(str(folder)))

    def test_one_tensor_in_float32(self, originals: dict[str, Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(originals["bf16"], tmp_path / "partly"))
        path = folder / QUALITIES["bf16"].file
        write_tensors(path, read_header(path) | {"out_norm.weight": Tensor("F32", (256,))})
        line = refusal(lambda: find(str(folder), "bf16"))
        assert line.endswith("1 of another shape (out_norm.weight: F32 [256], expected BF16 [256])")

    def test_faults_of_every_kind_are_counted(self, folder: Path) -> None:
        table = read_header(folder / Q4_FILE)
        del table["out_norm.weight"], table["text_emb.biases"]
        table |= {"out_norm.weight": Tensor("BF16", (256,)), "extra": Tensor("U8", (1,))}
        table["text_linear.scales"] = Tensor("F32", (1000, 8))
        write_tensors(folder / Q4_FILE, table)
        assert refusal(lambda: find(str(folder))).endswith(
            "does not hold the tensors that its config asks for: 1 missing (text_emb.biases), 1 unknown (extra), "
            "1 of another shape (text_linear.scales: F32 [1000, 8], expected BF16 [1000, 8])"
        )

    def test_a_mimi_with_too_few_codebooks(self, folder: Path) -> None:
        write_tensors(folder / MIMI_FILE, mimi_table(SIZES["tiny"].mimi._replace(codebooks=4)))
        assert "has 4 codebooks of 2048 entries, the model asks for 8 of 2048" in refusal(lambda: find(str(folder)))

    def test_a_mimi_of_an_impossible_width(self, folder: Path) -> None:
        write_tensors(folder / MIMI_FILE, mimi_table(SIZES["tiny"].mimi._replace(dim=96)))
        assert "has a width of 96, expected a multiple of 64" in refusal(lambda: find(str(folder)))

    def test_a_mimi_with_a_tensor_missing(self, folder: Path) -> None:
        table = read_header(folder / MIMI_FILE)
        del table["upsample.convtr.convtr.convtr.weight"]
        write_tensors(folder / MIMI_FILE, table)
        assert "1 missing (upsample.convtr.convtr.convtr.weight)" in refusal(lambda: find(str(folder)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestSynthesize:
    def test_the_same_seed_gives_the_same_files(self, originals: dict[str, Path], tmp_path: Path) -> None:
        synthesize(tmp_path / "again", "q4", "tiny", seed=0)
        assert contents(tmp_path / "again") == contents(originals["q4"])

    def test_another_seed_gives_others(self, originals: dict[str, Path], tmp_path: Path) -> None:
        synthesize(tmp_path / "other", "q4", "tiny", seed=1)
        first, other = contents(originals["q4"]), contents(tmp_path / "other")
        assert {name for name in first if first[name] == other[name]} == {CONFIG_FILE}

    def test_it_streams(self, tmp_path: Path) -> None:
        tracemalloc.start()
        made = synthesize(tmp_path / "small", "q4", "small")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made.model_file.stat().st_size > 80e6
        assert peak < 60e6

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        made = synthesize(tmp_path / "made", "q8", "tiny", progress=lambda done, total: seen.append((done, total)))
        tensors = [*read_header(made.model_file).values(), *read_header(made.mimi_file).values()]
        assert seen == sorted(seen)
        assert seen[-1] == (seen[-1][1], sum(tensor.nbytes for tensor in tensors))

    @pytest.mark.parametrize("size", SIZES)
    def test_every_size_can_be_quantized(self, size: str) -> None:
        config = msgspec.convert(dict(OFFICIAL) | dict(SIZES[size].config), ModelConfig)
        for quality, entry in QUALITIES.items():
            if entry.group is not None:
                table = model_table(config, quality).values()
                columns = {tensor.shape[1] * 32 // (entry.bits or 0) for tensor in table if tensor.dtype == "U32"}
                assert not [count for count in columns if count % entry.group]

    @pytest.mark.parametrize("size", SIZES)
    def test_timing_of_the_streams_is_the_official_one(self, size: str) -> None:
        assert SIZES[size].config.keys().isdisjoint({"n_q", "dep_q", "card", "delays", "context"})
        assert (SIZES[size].mimi.codebooks, SIZES[size].mimi.bins) == (FULL_MIMI.codebooks, FULL_MIMI.bins)

    def test_the_tokenizer_says_words(self, originals: dict[str, Path]) -> None:
        processor = sentencepiece.SentencePieceProcessor(str(originals["q4"] / TOKENIZER_FILE))
        pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
        assert pieces[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
        assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, 3)
        assert len(set(pieces)) == len(pieces) == SIZES["tiny"].config["text_card"]
        assert all(re.fullmatch("▁[a-z]+", piece) for piece in pieces[4:])

    def test_the_largest_vocabulary_has_as_many_words(self) -> None:
        model = tokenizer(OFFICIAL["text_card"], np.random.default_rng(0))
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert processor.vocab_size() == OFFICIAL["text_card"]

    def test_it_overwrites_nothing(self, originals: dict[str, Path]) -> None:
        before = contents(originals["q4"])
        line = refusal(lambda: synthesize(originals["q4"], "q8", "tiny"))
        assert line == f"{originals['q4'] / CONFIG_FILE} is in the way: give another folder, or remove it"
        assert contents(originals["q4"]) == before

    def test_too_little_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000_000))
        line = refusal(lambda: synthesize(tmp_path / "7b", "q4", "7b"))
        assert line == f"{tmp_path / '7b'} has 4.0 GB free, expected 5.2 GB"

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert "cannot be written: Not a directory" in refusal(
            lambda: synthesize(tmp_path / "file" / "x", "q4", "tiny")
        )

    @pytest.mark.parametrize(("quality", "size"), [("q5", "tiny"), ("q4", "huge")])
    def test_unknown_kinds(self, tmp_path: Path, quality: str, size: str) -> None:
        line = refusal(lambda: synthesize(tmp_path, quality, size))
        assert line == (
            f"cannot make {size} in {quality}: expected a size of tiny, small, 7b and a quality of q4, q8, bf16"
        )

    def test_an_interrupted_one_leaves_nothing(self, tmp_path: Path) -> None:
        def interrupt(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path / "broken", "q4", "tiny", progress=interrupt)
        assert list((tmp_path / "broken").iterdir()) == []
