"""Files and memory that somebody else may have written: each is read whole, or refused by its one documented error."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from stream_monitor.anchors.profile import Profile, ProfileError, make_profile
from stream_monitor.config import CaptureSettings, MonitorSettings, SettingsError, load
from stream_monitor.publisher.backlog import Backlog
from stream_monitor.records import Ledger, RowLedger, StepRecord, TokenRun, encode
from stream_monitor.ring import RingError, RingReader, RingWriter
from stream_monitor.tracing.comparison import OtherTrace
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.masks import LayerMasks, MaskFile, MaskWriter
from stream_monitor.tracing.model import read_messages
from stream_monitor.tracing.routes import ROUTES
from stream_monitor.tracing.sentence_file import SentenceFile, SentenceWriter
from stream_monitor.tracing.sentence_mass import SentenceMass
from stream_monitor.tracing.texts import read_texts
from stream_monitor.tracing.trace import MASKS
from tests.fuzz.mutations import corrupted


class Reader(NamedTuple):
    """One kind of file.

    Attributes:
        name: of the file.
        write: makes a sound one.
        read: reads all of it.
        refusal: what a damaged one ends with.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    refusal: type[Exception]


def attack(reader: Reader, folder: Path, draw: Random) -> None:
    """Read a damaged file; any other end than the two that may be is the caller's to see."""
    path = folder / reader.name
    reader.write(path)
    raw = path.read_bytes()
    for _ in range(draw.randint(1, 3)):
        raw = _damaged(raw, draw)
    path.write_bytes(raw)
    said = "read"
    try:
        reader.read(path)
    except reader.refusal as error:
        said = str(error)
    assert said.strip(), "a refusal says why"
    assert "\n" not in said, "a refusal is one line"


def _damaged(raw: bytes, draw: Random) -> bytes:
    """Other bytes; in text, as often, another value in the place of one."""
    if draw.random() < 0.5:
        return corrupted(raw, draw)
    words = raw.split(b" ")
    place = draw.randrange(len(words))
    words[place] = draw.choice(
        (b"null,", b"[],", b"{},", b'"",', b"-1,", b"1e999,", b"NaN,", b"true,", b"9" * 400 + b",", b"[" * 5000, b"")
    )
    return b" ".join(words)


def _write_profile(path: Path) -> None:
    references = {"anchor_shift": {"all": (40, 0.2, 0.1)}}
    make_profile("m", "c", 1, {"anchor_shift": [0.1, 0.2, 0.3]}, 10, references=references).write(path)


def _use_profile(path: Path) -> None:
    profile = Profile.read(path)
    for kind in profile.highest:
        profile.threshold(kind, 0.1)
        profile.p_value(kind, 0.2)
    profile.check(0.5)


def _write_settings(path: Path) -> None:
    path.write_text(
        '[capture]\nstride = 4 \nlayers = "auto" \n[monitor]\ngrpc = "127.0.0.1:9750" \nstore_days = 7.0 \n'
    )


def _load_settings(path: Path) -> None:
    os.environ["STREAM_MONITOR_CONFIG"] = str(path)
    try:
        load(CaptureSettings)
        load(MonitorSettings)
    finally:
        del os.environ["STREAM_MONITOR_CONFIG"]


def _write_messages(path: Path) -> None:
    path.write_text(json.dumps([{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it"}]))


def _write_texts(path: Path) -> None:
    path.write_text((json.dumps({"id": "a", "prompt": "what is it?", "reasoning": "it is so."}) + "\n") * 2)


def _write_sentences(path: Path) -> None:
    writer = SentenceWriter(path)
    some = np.arange(3, dtype=np.int32)
    writer.write(SentenceMass(some, some * 0, some, np.full(3, 0.5, np.float32), np.full((3, 1), 0.5, np.float32)))
    writer.close()


def _write_masks(path: Path) -> None:
    writer = MaskWriter(path)
    blocks, heads = 3, 2
    writer.write(
        LayerMasks(
            first_position=np.arange(blocks, dtype=np.int32) * 32,
            rows=np.full(blocks, 32, np.int32),
            block_ids=np.zeros((blocks, heads, 2), np.int32),
            block_shares=np.full((blocks, heads, 2), 0.25, np.float32),
            forced_ids=np.zeros((blocks, 2), np.int32),
            forced_shares=np.full((blocks, heads, 2), 0.2, np.float32),
            unobserved=np.full((blocks, heads), 0.1, np.float32),
            keys_read=np.full(blocks, 32.0, np.float32),
        )
    )
    writer.close({"search": {"block_size": 32}, "tokens": list(range(96))})


def _write_trace(path: Path) -> None:
    _write_masks(path.parent / MASKS)
    path.write_text(json.dumps({"needle_tokens": [3, 5]}))


READERS = (
    Reader("profile.json", _write_profile, _use_profile, ProfileError),
    Reader("settings.toml", _write_settings, _load_settings, SettingsError),
    Reader("messages.json", _write_messages, read_messages, TracingError),
    Reader("texts.jsonl", _write_texts, read_texts, TracingError),
    Reader("sentences.parquet", _write_sentences, lambda path: list(SentenceFile(path)), TracingError),
    Reader(MASKS, _write_masks, lambda path: list(MaskFile(path)), TracingError),
    Reader(ROUTES, _write_trace, lambda path: OtherTrace.open(path.parent, 1, 96, 32), TracingError),
)


def attack_ring(draw: Random) -> None:
    """A ring in which anything may stand: read to its end without an exception, and nothing made up."""
    writer = RingWriter(4096)
    try:
        for number in range(draw.randrange(8)):
            rows = RowLedger(expected=number, captured=number)
            record = StepRecord(number, 0, Ledger(rows, rows), tokens=[TokenRun("r", number, b"\1")])
            writer.write(encode(record), number, number)
        size = os.fstat(writer.fd).st_size
        for _ in range(draw.randrange(4)):
            garbage = draw.choice((draw.randbytes(8), b"\xff" * 8, b"\0" * 8, draw.randbytes(draw.randrange(1, 600))))
            # The header's first words say what it is; behind them stand positions and counts, then records.
            os.pwrite(writer.fd, garbage, draw.choice((draw.randrange(200), draw.randrange(size - len(garbage)))))
        try:
            reader = RingReader(writer.fd)
        except RingError:
            return
        try:
            taken = Backlog(reader).take(most=1000)
            assert taken <= 1000
        finally:
            reader.close()
    finally:
        writer.close()
