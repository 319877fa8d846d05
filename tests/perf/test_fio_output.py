"""fio's JSON as numbers: outputs of fio 3.33 as they were captured, good ones and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.fio_output import FioOutputError, parse
from perf.model import METRICS

_CAPTURED = Path(__file__).with_name("fio_output")


def _output(name: str) -> str:
    return (_CAPTURED / f"{name}.txt").read_text()


def test_a_read_job() -> None:
    result = parse(_output("read"))
    assert (result.operations, result.read_bytes, result.written_bytes) == (87976, 360349696, 0)
    assert result.iops == pytest.approx(87976 / 0.101)
    assert result.bytes_per_second == pytest.approx(360349696 / 0.101, abs=1)
    assert result.seconds == 0.101
    assert (result.latency_p50_us, result.latency_p99_us, result.latency_p999_us) == (
        0.482,
        0.708,
        30.08,
    )
    assert result.latency_mean_us == pytest.approx(0.999, abs=1e-3)
    assert (result.errors, result.corrupt) == (0, 0)
    assert result.latency == {}, "not in plain JSON"


def test_a_verify_job_has_the_figures_of_its_writes_and_the_count_of_all() -> None:
    result = parse(_output("verified"))
    assert result.read_bytes == result.written_bytes == 1 << 20
    assert result.operations == 236
    assert result.iops == 118000
    assert (result.errors, result.corrupt) == (0, 0)


def test_json_plus_has_every_request_in_a_bin() -> None:
    result = parse(_output("verified"))
    assert sum(result.latency.values()) == 118, "the writes"
    assert min(result.latency) <= 1000 * result.latency_p50_us <= max(result.latency)


def test_reads_and_writes_reported_as_one() -> None:
    result = parse(_output("mixed"))
    assert result.operations == 9362
    assert result.iops == pytest.approx(9362 / 0.011)


def test_wrong_data_is_counted_by_the_block() -> None:
    output = _output("wrong-data")
    assert output.startswith("verify : Saving output"), "messages come before the JSON"
    result = parse(output)
    assert (result.errors, result.corrupt) == (5, 5)


def test_an_io_error_is_an_error_but_no_wrong_data() -> None:
    result = parse(_output("io-error"), 1)
    assert (result.errors, result.corrupt) == (1, 0)


def test_an_exit_code_alone_is_an_error() -> None:
    assert parse(_output("read"), 1).errors == 1


def test_metrics_have_the_names_of_the_model() -> None:
    result = parse(_output("read"))
    assert set(result.metrics) <= set(METRICS)
    assert result.metrics["iops"] == result.iops
    assert result.as_json()["read_bytes"] == result.read_bytes


@pytest.mark.parametrize(
    ("name", "said"),
    [("bad-option", "failed parsing rw"), ("no-device", "file creation disallowed")],
)
def test_a_job_that_did_nothing_is_refused_with_what_fio_said(name: str, said: str) -> None:
    with pytest.raises(FioOutputError, match=said) as caught:
        parse(_output(name), 1)
    assert '"jobs"' not in str(caught.value), "the message is for people"


def test_messages_around_the_json_do_no_harm() -> None:
    text = _output("read")
    noisy = "note: {not JSON}\n{\nneither is this\n" + text + "fio: bye {\n"
    assert parse(noisy) == parse(text)


@pytest.mark.parametrize("length", range(0, len(_output("read")) - 2, 701))
def test_a_truncated_output_is_refused(length: int) -> None:
    with pytest.raises(FioOutputError):
        parse(_output("read")[:length])


@pytest.mark.parametrize(
    "output", ["", "Killed\n", "{\n}", '{\n"jobs": []}', '{\n"jobs": [{}]}', '{\n"jobs": [1, 2]}']
)
def test_what_is_no_output_of_a_job_is_refused(output: str) -> None:
    with pytest.raises(FioOutputError, match="exit code 137"):
        parse(output, 137)
