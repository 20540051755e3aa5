"""What was interrupted goes on as the same run only, and says what differs."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brainmass_kernels as bk
from brainmass_kernels import files

MU = np.linspace(0.2, 0.8, 4)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def relaxing(strength: float = 1.0, start: float = 0.5, gain: float = 1.0):
    """A class of one name, whatever its equations, as a cell of a notebook makes it again and again."""

    @bk.model
    class Relaxing(bk.Model):
        rate: Any = 20.0 * u.Hz
        weight: Any = 2.0

        states = {"r": u.mV}
        inputs = {"drive": 0.3}
        observables = {"seen": u.mV}
        initial = {"r": start * u.mV}

        @staticmethod
        def drift(s, p, i):
            return {"r": p.rate * (strength * jnp.tanh(i.drive + p.weight * s.r) - s.r)}

        @staticmethod
        def observe(s, p):
            return {"seen": gain * s.r}

    return Relaxing


class Stopped(Exception):
    pass


# --- sweeps ---


def moment(power: int):
    @dataclasses.dataclass(frozen=True)
    class Moment(bk.Mean):
        """A statistic of the user's own."""

        def add(self, held, x, first, sampling):
            return super().add(held, x**power, first, sampling)

    return Moment()


def swept(model=None, **changes):
    arguments = {"over": {"weight": np.linspace(0.5, 3.0, 4)}, "duration": 20, "dt": 0.5 * u.ms, "chunk": 2}
    arguments |= {"record": {"m": moment(2), "seen": "seen"}, "out": "grid.npz", "implementation": "scan", **changes}
    return bk.sweep(relaxing()() if model is None else model, **arguments)


def interrupted(**changes):
    def stop(line):
        raise Stopped

    with pytest.raises(Stopped):
        swept(progress=stop, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": relaxing(strength=2.0)()}, "What differs: the model's equations$"),
        ({"model": relaxing(gain=2.0)()}, r"'record' \(m is another\), 'record' \(seen is another\)$"),
        ({"model": relaxing(start=0.6)()}, r"'initial r' \(0\.5 then, 0\.6 now\)$"),
        ({"model": relaxing()(rate=21 * u.Hz)}, r"'rate' \(20\.0 then, 21\.0 now\)$"),
        ({"record": {"m": moment(3), "seen": "seen"}}, r"'record' \(m is another\)$"),
        ({"record": {"m": moment(2)}}, r"'record' \(seen is recorded no more\)$"),
        ({"record": {"m": moment(2), "seen": "seen", "r": "r"}}, r"'record' \(r was not recorded\)$"),
        ({"inputs": {"drive": 0.4}}, r"'drive' \(0\.3 then, 0\.4 now\)$"),
        ({"over": {"weight": np.linspace(0.5, 3.1, 4)}}, r"'over' \(the values of weight\)$"),
        ({"dt": 0.25 * u.ms}, r"'dt' \(0\.0005 then, 0\.00025 now\)$"),
        ({"duration": 22}, r"'duration' \(20 then, 22 now\)"),
        ({"transient": 2, "every": 2}, r"'transient' \(0 then, 2 now\), 'every' \(1 then, 2 now\)"),
        ({"scheme": "rk4"}, r"'scheme' \(heun then, rk4 now\), the model's equations$"),
        ({"precision": "fast"}, r"'precision' \(exact then, fast now\)$"),
        ({"chunk": 3}, r"'chunk' \(2 then, 3 now\)"),
        ({"noise": {"drive": 0.1 * u.second**0.5}, "key": jax.random.key(0)}, "'noise drive'"),
    ],
)
def test_a_sweep_goes_on_with_the_same_programs_only(changes, said):
    interrupted()
    with pytest.raises(ValueError, match=f"chunks of a sweep with other arguments: delete it.*{said}"):
        swept(**changes)


def test_a_sweep_of_another_precision_is_refused():
    interrupted()
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"differs: 'dtype' \(float32 then, float64 now\)$"):
        swept()


def test_a_sweep_of_the_same_equations_goes_on_though_the_class_is_another():
    interrupted()
    told = []
    found = swept(progress=told.append)
    assert told[0] == "resuming after 1 of 2 chunks"
    whole = swept(out=None)
    for name, x in whole.records.items():
        np.testing.assert_array_equal(u.get_magnitude(found[name]), u.get_magnitude(x))


def test_noise_is_known_by_its_key():
    noise = {"noise": {"drive": 0.1 * u.second**0.5}}
    interrupted(key=jax.random.key(0), **noise)
    for key in (jax.random.key(1), jax.random.key(0, impl="rbg")):
        with pytest.raises(ValueError, match="differs: 'key'"):
            swept(key=key, **noise)


# --- fits ---

RUN: dict[str, Any] = {
    "duration": 20, "dt": 1 * u.ms, "every": 2, "transient": None, "realisations": 1, "starts": 2, "steps": 2,
    "record": "seen", "implementation": "scan",
}  # fmt: skip
TARGET = bk.TimeSeries(np.linspace(0.5, 0.9, 10)[None] * u.mV)


def toward(goal: float):
    """A function that has one name, whatever it computes."""

    def distance(result):
        return (result["seen"].mantissa - goal) ** 2

    return distance


def fitted(model=None, target: Any = TARGET, **changes) -> bk.Fit:
    return bk.fit(relaxing()() if model is None else model, target, {"weight": (0.5, 4.0)}, **{**RUN, **changes})


def stopped(**changes):
    """A fit that was stopped after its first step, with a checkpoint."""

    def stop(report):
        raise Stopped

    with pytest.raises(Stopped):
        fitted(checkpoint="part.json", progress=stop, **changes)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model": relaxing(strength=2.0)()}, "What differs: the model's equations$"),
    ({"model": relaxing(gain=2.0)()}, r"'record' \(seen is another\)"),
    ({"model": relaxing(start=0.6)()}, r"'initial r' \(0\.5 then, 0\.6 now\)"),
    ({"record": "r"}, "record = seen, but this call has r|'record'"),
    ({"starts": 3}, "starts = 2, but this call has 3"),
    ({"scheme": "rk4"}, "scheme"),
]


@pytest.fixture(scope="module")
def series() -> bk.Fit:
    return fitted()


@pytest.mark.parametrize(("changes", "said"), CHANGES)
def test_a_fit_goes_on_with_the_same_programs_only(series, changes, said):
    series.save("fit.json")
    saved = bk.Fit.load("fit.json", relaxing()())
    for resume in (series, saved):
        with pytest.raises(ValueError, match=said):
            fitted(**{"resume": resume, **changes})


def test_a_fit_in_another_precision_is_refused(series):
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"'dtype' \(float32 then, float64 now\)$"):
        fitted(resume=series)


def test_a_fit_goes_on_with_its_own_number_of_starts(series):
    more = fitted(resume=series, starts=None, steps=1)
    assert more.losses.shape == (3, 1, 2)


def test_a_loaded_fit_is_not_evaluated_with_other_equations(series):
    series.save("fit.json")
    assert np.isfinite(bk.Fit.load("fit.json", relaxing()()).standard_errors()["weight"]).all()
    read = bk.Fit.load("fit.json", relaxing(strength=2.0)())
    with pytest.raises(ValueError, match=r"'model' got another fit\. What differs: the model's equations"):
        read.standard_errors()


def test_a_checkpoint_goes_on_with_the_same_programs_only():
    stopped()
    same = {"checkpoint": "part.json"}
    changed: list[tuple[dict[str, Any], str]] = [
        *CHANGES,
        ({"clip": 0.2}, "clip = 0.1, but this call has 0.2"),
        ({"prune": 1}, "prune = 0, but this call has 1"),
        ({"screen": 4}, "screen = 0, but this call has 4"),
        ({"optimiser": optax.adam(0.1, b2=0.99)}, "optimiser ="),
        ({"starts": {"weight": [1.0, 2.0]}}, "starts = 2, but this call has"),
    ]
    for changes, said in changed:
        with pytest.raises(ValueError, match=said):
            fitted(**same, **changes)
    np.testing.assert_array_equal(fitted(**same).losses, fitted().losses)


def test_functions_are_told_apart_by_what_they_compute():
    stopped(target=toward(0.7))
    with pytest.raises(ValueError, match=r"'checkpoint' got another fit\. What differs: 'target'"):
        fitted(target=toward(0.8), checkpoint="part.json")
    for record in ("r", ["seen", "r"], {"seen": bk.Mean(of="seen")}):
        with pytest.raises(ValueError, match="'record'"):
            fitted(target=lambda result: 0 * next(iter(result.records.values())).mantissa, record=record,
                   checkpoint="part.json")  # fmt: skip

    def named_otherwise(outcome):
        return (outcome["seen"].mantissa - 0.7) ** 2

    found = fitted(target=named_otherwise, checkpoint="part.json")
    found.save("fit.json")
    saved = bk.Fit.load("fit.json", relaxing()())
    assert len(fitted(target=toward(0.7), resume=saved, steps=1).losses) == 3
    with pytest.raises(ValueError, match=r"'resume' got another fit\. What differs: 'target'"):
        fitted(target=toward(0.8), resume=saved)


def earlier(path: str):
    """A file as it was before programs were kept in it."""
    document = files.read_document(path)
    del document["settings"]["program"]
    document.pop("call", None)
    Path(path).write_text(json.dumps(document))


def test_files_of_an_earlier_version_are_read_with_a_warning(series):
    series.save("fit.json")
    earlier("fit.json")
    read = bk.Fit.load("fit.json", relaxing()())
    with pytest.warns(UserWarning, match="whether the model's equations are the same is not known"):
        assert len(fitted(resume=read, steps=1).losses) == 3
    with pytest.warns(UserWarning, match="saved by an earlier version"), pytest.raises(ValueError, match="starts = 2"):
        fitted(resume=read, starts=3)
    stopped()
    earlier("part.json")
    with pytest.warns(UserWarning, match="'checkpoint' got a fit that was saved by an earlier version"):
        np.testing.assert_array_equal(fitted(checkpoint="part.json").losses, fitted().losses)


def test_programs_of_another_version_of_jax_are_no_evidence(series):
    told = {**series.settings["program"], "jax": "0.1"}
    other = dataclasses.replace(series, settings={**series.settings, "program": told})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(resume=other, steps=1)
    told["equations"] = "0123456789abcdef"
    with pytest.warns(UserWarning, match=r"made with jax 0\.1, not .*the model's equations"):
        fitted(resume=other, steps=1)


# --- files of fits ---


def test_a_damaged_fit_is_refused_or_whole(series):
    series.save("fit.json")
    whole = Path("fit.json").read_bytes()
    want, refused = json.dumps(_read(series)), 0
    for place in np.linspace(0, len(whole) - 1, 200).astype(int):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(place) % 7
        Path("fit.json").write_bytes(changed)
        found, said = _loaded("fit.json")
        refused += found is None
        if found is None:
            assert said.startswith("fit.json: not a fit saved by this brainmass_kernels, or damaged")
        else:
            assert json.dumps(_read(found)) == want, f"byte {place}"
    assert refused > 190


def _loaded(path: str) -> tuple[bk.Fit | None, str]:
    try:
        return bk.Fit.load(path, relaxing()()), ""
    except ValueError as error:
        return None, str(error)


def _read(found: bk.Fit) -> list:
    arrays = found.losses, found.rms, found.state["best_z"]["weight"], u.get_magnitude(found.parameters["weight"])
    return [np.round(x, 6).tolist() for x in arrays]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", '{"format": "brainmass_kernels.Fit under way"}'])
def test_a_damaged_checkpoint_is_refused_with_what_to_do(text):
    Path("part.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"part\.json: not a checkpoint of a fit, or damaged .*; delete it"):
        fitted(checkpoint="part.json")


def test_a_checkpoint_is_one_file_wherever_the_process_goes(elsewhere, monkeypatch):
    Path("other").mkdir()
    fitted(checkpoint="part.json", progress=lambda report: monkeypatch.chdir(elsewhere / "other"))
    assert sorted(x.name for x in elsewhere.iterdir()) == ["other", "part.json"]
    assert not list((elsewhere / "other").iterdir())
    with pytest.raises(ValueError, match=r"'checkpoint' got absent/part\.json, but there is no folder"):
        fitted(checkpoint="absent/part.json")


def test_a_fit_is_saved_through_a_link_and_whole(series, elsewhere, monkeypatch):
    Path("store").mkdir()
    Path("fit.json").symlink_to("store/kept.json")
    series.save("fit.json")
    assert Path("fit.json").is_symlink()
    whole = Path("store/kept.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        series.save("fit.json")
    assert Path("store/kept.json").read_bytes() == whole
    assert [x.name for x in (elsewhere / "store").iterdir()] == ["kept.json"]


@pytest.mark.filterwarnings("ignore:nothing improved")
def test_a_fit_of_a_made_model_is_not_read_as_the_plain_one(series):
    made = bk.coloured(relaxing()(), "drive", tau=10 * u.ms)
    fitted(made, record="seen", steps=1).save("fit.json")
    with pytest.raises(ValueError, match="of a Relaxing that has tau_drive; give that"):
        bk.Fit.load("fit.json", relaxing()())
    assert u.get_magnitude(bk.Fit.load("fit.json", made).model.tau_drive) == 0.01


def test_a_fit_to_a_series_in_a_unit_that_has_no_name_in_brainunit_is_read():
    target = bk.TimeSeries(np.linspace(0.5, 0.9, 10)[None] * u.ftesla, scale=True)
    assert not hasattr(u, str(u.ftesla))
    fitted(target=target, steps=1, starts=1).save("fit.json")
    read = bk.Fit.load("fit.json", relaxing()())
    assert read.target.values.unit == u.ftesla == read.prediction.values.unit
