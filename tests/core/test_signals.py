"""Signals stop a command wherever it is, whatever a library does with the error."""

import contextlib
import os
import pathlib
import signal
import sys
import time

import pytest

from keras_cifar.core import environment, signals
from keras_cifar.core.errors import StoppedError
from keras_cifar.core.signals import StopSignals
from keras_cifar.data import cache, images, tfds
from keras_cifar.training import trainer


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here uses Keras."""


@pytest.fixture
def stop():
    """Whoever tests leaves handlers, the hook and the timer as they were."""
    numbers = (*signals.SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    yield StopSignals()
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.001)  # Python hears it


def swallowed() -> None:
    with contextlib.suppress(BaseException):
        send()


def made_another_error() -> None:
    try:
        send()
    except BaseException as error:
        raise ValueError("the library failed") from error


class Finalized:
    def __del__(self):
        send()


class FinalizedByAnotherError:
    def __del__(self):
        made_another_error()


def finalized_by_another_error() -> None:
    FinalizedByAnotherError()
    time.sleep(30)


def finalized() -> None:
    Finalized()
    time.sleep(30)


def finalized_last() -> None:
    Finalized()


def swallowed_and_goes_on() -> None:
    swallowed()
    time.sleep(30)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_error_is_no_exception_and_has_the_shells_status(stop, number):
    words = f"stopped by {number.name}; saved files are intact"
    with pytest.raises(StoppedError, match=words) as caught, stop.handled():
        try:
            send(number)
        except Exception:
            pytest.fail("it was taken for a failure")
    assert caught.value.status == 128 + number


def test_where_it_is_deferred_the_body_ends_first(stop):
    done = []
    with pytest.raises(StoppedError), stop.handled(), stop.deferred():
        send()
        done.append(stop.received)
    assert done == [signal.SIGTERM]


@pytest.mark.parametrize(
    "work",
    [
        swallowed,
        made_another_error,
        finalized,
        finalized_by_another_error,
        finalized_last,
        swallowed_and_goes_on,
    ],
)
def test_what_a_library_makes_of_the_error_does_not_hide_it(stop, monkeypatch, capfd, work):
    monkeypatch.setattr(signals, "AGAIN", 0.05)
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), stop.handled():
        work()
    assert capfd.readouterr() == ("", "")


def test_another_error_is_the_bodys_own(stop):
    with pytest.raises(ValueError, match="mine"), stop.handled():
        raise ValueError("mine")
    # An error while the body saves, because of the signal, is what the user must know.
    with pytest.raises(OSError, match="disk"), stop.handled(), stop.deferred():
        send()
        raise OSError("disk full")


def test_a_body_in_a_body_changes_nothing(stop):
    with stop.handled():
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
        with stop.handled():
            pass
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == handlers


def test_nothing_is_left_for_a_later_body(stop):
    with pytest.raises(StoppedError), stop.handled():
        send()
    assert stop.received is None
    with pytest.raises(StoppedError), stop.handled(), stop.deferred():
        send()
    assert stop.received is None


def test_second_signal_exits_at_once(stop, monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with pytest.raises(StoppedError), stop.handled(), stop.deferred():
        send()
        assert not exits
        send(signal.SIGINT)
        assert exits == [130]


def test_other_errors_that_cannot_be_raised_are_shown(stop, monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)

    class Bad:
        def __del__(self):
            raise ZeroDivisionError

    with stop.handled():
        Bad()
    assert found[0].exc_type is ZeroDivisionError
    monkeypatch.undo()


class Interrupted:
    """A data set of TFDS whose download is interrupted."""

    data_path = pathlib.Path("/nowhere")
    url_infos = ()

    def download_and_prepare(self):
        send()


def downloading(tmp_path, monkeypatch):
    tfds._prepare(Interrupted(), "cifar10")


def reporting(tmp_path, monkeypatch):
    with trainer.optional(tmp_path / "report.html"):
        send()


def opening_a_cache_entry(tmp_path, monkeypatch):
    (tmp_path / "entry.json").write_text("{}")
    monkeypatch.setattr(cache.json, "loads", lambda text: send())
    assert cache._open(tmp_path) is not None, "it counts as damaged"


def reading_an_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"an image")
    monkeypatch.setattr(images.Image, "open", lambda *_, **__: send())
    images.load_image(tmp_path / "a.png")


@pytest.mark.parametrize("work", [downloading, reporting, opening_a_cache_entry, reading_an_image])
def test_a_signal_is_no_failure_of_what_it_interrupts(stop, tmp_path, monkeypatch, work):
    with pytest.raises(StoppedError), stop.handled():
        try:
            work(tmp_path, monkeypatch)
        except Exception as error:
            pytest.fail(f"it was taken for a failure: {error}")


@pytest.mark.parametrize("stopped", [True, False])
def test_messages_of_an_import_that_a_signal_stops_are_not_shown(monkeypatch, capfd, stopped):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "tensorflow":
                os.write(2, b"noise")
                if stopped:
                    made_another_error()
                raise ValueError("the import failed")

    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    expected = StoppedError if stopped else ValueError
    with pytest.raises(expected), signals.STOP.handled():
        environment.import_tensorflow()
    assert capfd.readouterr().err == ("" if stopped else "noise")
