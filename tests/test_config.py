"""What an experiment file may say, and how it is refused: file and line, key, what is wrong, what would be right."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raystudy.config import Experiment, load_experiment
from raystudy.errors import StudyError

BASE = """\
name: check
sources:
  H1: {kind: phantom}
  H2: {kind: phantom}
tasks:
  pneumonia: {positive: pneumonia}
"""
EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))


def load(folder: Path, text: str, *overrides: str) -> Experiment:
    file = folder / "check.yaml"
    file.write_text(text, encoding="utf-8")
    return load_experiment(file, list(overrides))


def outcome(folder: Path, text: str, *overrides: str) -> str:
    """Return the refusal, or nothing where the file is accepted."""
    try:
        load(folder, text, *overrides)
    except StudyError as error:
        return str(error)
    return ""


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(StudyError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert "check.yaml" in message or message.startswith("--set")
    assert "Traceback" not in message
    assert "validation error" not in message  # pydantic's own words stay inside
    return message


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_every_experiment_of_the_repository_loads(file: Path) -> None:
    assert load_experiment(file).name


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    study = load(tmp_path, BASE)
    assert study.mixtures == tuple(range(0, 101, 10))
    assert (study.model.backbone, study.model.prototypes_per_class, study.images.size) == ("resnet34", 10, 224)
    assert (study.training.epochs, study.training.batch_size, study.training.lr_backbone) == (50, 80, 1e-4)


# text to append, line of the fault, key path, what is said, remedy
REFUSALS = {
    "an unknown key": ("mixtres: [0]\n", 7, "mixtres", "unknown key", "did you mean `mixtures`?"),
    "an unknown key of a section": (
        "training:\n  warm_epochs: 2\n  epoch: 3\n", 9, "training.epoch", "unknown key", "did you mean `epochs`?",
    ),
    "a key far from any other": ("model: {zzz: 1}\n", 7, "model.zzz", "unknown key", "known keys are backbone"),
    "text where a number belongs": (
        "training:\n  epochs: many\n", 8, "training.epochs", "valid integer", 'got "many"',
    ),
    "a number where text belongs": ("storage: 3\n", 7, "storage", "valid string", "got 3"),
    "a list where a section belongs": ("training: [1]\n", 7, "training", "", ""),
    "a share above 100": ("mixtures: [0, 101]\n", 7, "mixtures.1", "less than or equal to 100", "got 101"),
    "a share below 0": ("mixtures:\n  - 0\n  - -10\n", 9, "mixtures.1", "greater than or equal to 0", "got -10"),
    "a share that is no integer": ("mixtures: [0.5]\n", 7, "mixtures.0", "integer", "got 0.5"),
    "no share at all": ("mixtures: []\n", 7, "mixtures", "at least one value", ""),
    "a share twice": ("mixtures: [0, 0]\n", 7, "mixtures", "must not repeat", ""),
    "a word that is no choice": (
        "model: {backbone: vgg19}\n", 7, "model.backbone", "'resnet18', 'resnet34' or 'resnet50'", 'got "vgg19"',
    ),
    "a value out of its range": ("images: {size: 8}\n", 7, "images.size: ", "must lie in 32..2048", "got 8"),
    "an impossible schedule": (
        "training:\n  epochs: 4\n  warm_epochs: 9\n", 9, "training.warm_epochs: ", "must lie in 0..epochs = 4", "got 9",
    ),
    "a key twice": ("name: other\n", 7, "name", "stands twice", "mend"),
    "an axis that is no setting": ("axes: {model.backbon: [resnet18]}\n", 7, "axes", "no setting", "model.backbone"),
    "an axis of another section": ("axes: {storage: [a]}\n", 7, "axes", "must begin with one of", "model.backbone"),
    "an axis without values": ("axes: {model.backbone: []}\n", 7, "axes", "at least one value", ""),
    "an axis with a wrong value": (
        "axes:\n  model.backbone: [resnet18, vgg]\n", 8, "axes.model.backbone", "resnet50", '"vgg"',
    ),
    "an axis with a value twice": (
        "axes:\n  model.prototype_dim: [64, 64.0]\n", 8, "axes.model.prototype_dim", "must not repeat", "64",
    ),
    "a rate that overflows": (
        "training: {lr_add_on: 1e308}\n", 7, "training.lr_add_on: ", "must lie in (0, 1e30]", "got 1e+308",
    ),
    "a decay that overflows": (
        "training: {weight_decay: 1e308}\n", 7, "training.weight_decay: ", "must lie in", "1e30",
    ),
    "a coefficient that overflows": (
        "training: {coefficient_cluster: -1e300}\n", 7, "training.coefficient_cluster: ",
        "must lie in -1e30..1e30", "got -1e+300",
    ),
    "more threads than a machine has": (
        "training: {threads: 10000}\n", 7, "training.threads: ", "must lie in 1..128", "got 10000",
    ),
    "prototypes beyond any film": (
        "model: {prototypes_per_class: 100000}\n", 7, "model.prototypes_per_class: ",
        "must lie in 1..1000", "got 100000",
    ),
    "prototypes that are too long": (
        "model: {prototype_dim: 100000}\n", 7, "model.prototype_dim: ", "must lie in 1..4096", "",
    ),
    "a mask of nothing": (
        "explain: {mask_share: 1e-9}\n", 7, "explain.mask_share: ", "must lie in 0.01..0.99", "got 1e-09",
    ),
    "an odd study name": ("", 1, "name", "letters, digits, _ and -", 'got "../evil"'),
    "one seed without its list": ("seeds: 3\n", 7, "seeds", "got 3", "write a list: [3]"),
    "an axis that is searched too": (
        "axes: {training.epochs: [20]}\nsearch: {trials: 2, space: {training.epochs: {choice: [20]}}}\n",
        None, "training.epochs", "both an axis and searched", "keep one",
    ),
    "a search range upside down": (
        "search: {trials: 2, space: {training.weight_decay: {uniform: [1.0, 0.5]}}}\n",
        7, "search.space.training.weight_decay", "lower bound", "",
    ),
    "a logarithmic range from zero": (
        "search: {trials: 2, space: {training.weight_decay: {loguniform: [0.0, 0.5]}}}\n",
        7, "search.space.training.weight_decay", "positive bounds", "",
    ),
    "a range of two kinds": (
        "search: {trials: 2, space: {training.weight_decay: {uniform: [0.0, 0.5], choice: [1]}}}\n",
        7, "search.space.training.weight_decay", "exactly one of", "",
    ),
    "a search over nothing": ("search: {trials: 2, space: {}}\n", 7, "search.space", "at least 1", ""),
    "a search over no mixture": (
        "search: {trials: 2, space: {training.epochs: {choice: [20]}}, mixtures: []}\n",
        7, "search.mixtures", "at least one value", "",
    ),
    "a search over a mixture twice": (
        "search: {trials: 2, space: {training.epochs: {choice: [20]}}, mixtures: [50, 50]}\n",
        7, "search.mixtures", "must not repeat, got [50, 50]", "",
    ),
    "a date where a name belongs": ("notes: 2024-01-01\n", 7, "notes", "", ""),
    "a search over a word": (
        "search: {trials: 2, space: {training.epochs: {choice: [20, a]}}}\n",
        7, "search.space.training.epochs", "valid integer", 'got "a"',
    ),
    "an interval of words": (
        "search: {trials: 2, space: {model.backbone: {uniform: [0, 1]}}}\n",
        7, "search.space.model.backbone", "'resnet18', 'resnet34' or 'resnet50'", "got 0.0",
    ),
    "an interval of whole numbers": (
        "search: {trials: 2, space: {model.prototype_dim: {uniform: [32, 64]}}}\n",
        7, "search.space.model.prototype_dim", "valid integer", "got 42.1",
    ),
    "an interval beyond a setting's range": (
        "search: {trials: 2, space: {training.lr_backbone: {uniform: [-1, 0.2]}}}\n",
        7, "search.space.training.lr_backbone: must lie", "in (0, 1e30]", "got -1.0",
    ),
    "epochs without end": ("training: {epochs: 100001}\n", 7, "training.epochs: ", "must lie in 1..100000", ""),
    "more films than anyone looks at": ("explain: {top_k: 100000}\n", 7, "explain.top_k: ", "must lie in 1..1000", ""),
    "more draws than anyone waits for": (
        "explain: {adai_draws: 100000}\n", 7, "explain.adai_draws: ", "must lie in 1..10000", "",
    ),
    "an address that MLflow does not know": (
        "tracking: {uri: foo://bar}\n", 7, "tracking.uri", "must be sqlite:///FILE", "http(s):// server",
    ),
    "a folder for a database": ("tracking: {uri: runs}\n", 7, "tracking.uri", "must be sqlite:///FILE", ""),
    **{
        f"a database that keeps nothing, or is no file: {uri}": (
            f"tracking: {{uri: '{uri}'}}\n", 7, "tracking.uri", "must be sqlite:///FILE", "sqlite:///mlflow.db",
        )
        for uri in (
            "sqlite://mlflow.db", "sqlite://", "sqlite:///", "sqlite:////", "sqlite:///?timeout=9", "sqlite:///runs/",
            "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite:///file:a?mode=memory&uri=true",
            "sqlite+aiosqlite:///mlflow.db", "sqlite:///file:?uri=true",
        )
    },
    "a password": (
        "tracking: {uri: postgresql://me:hunter2@db/mlflow}\n", 7, "tracking.uri", "must hold no password", "",
    ),
    "a password among the options": (
        "tracking: {uri: 'postgresql://me@db/mlflow?password=hunter2'}\n", 7, "tracking.uri", "hold no password", "",
    ),
    "a number for a key": ("3: 4\n", 7, "(top level)", "the key 3 is no text", "put the key in quotes"),
    "a number for a key of a section": ("training: {3: 4}\n", 7, "training", "the key 3 is no text", "quotes"),
    "two of three shares": (
        "cohort: {split_fractions: [0.5, 0.5]}\n", 7, "cohort.split_fractions", "value 3 of this list is missing", "",
    ),
    "broken YAML": ("model: {backbone: resnet18\n", 8, "", "not valid YAML", "mend"),
    "a tab": ("model:\n\tbackbone: resnet18\n", 8, "", "not valid YAML", "mend"),
    "a Python object": ("notes: !!python/object/apply:os.system [ls]\n", 7, "", "not valid YAML", ""),
    "an unknown alias": ("notes: *nowhere\n", 7, "", "not valid YAML", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bad_file_is_refused_with_line_key_and_remedy(name: str, tmp_path: Path) -> None:
    more, line, key, what, remedy = REFUSALS[name]
    text = BASE + more if more else BASE.replace("name: check", "name: ../evil")
    message = refusal(tmp_path, text)
    assert line is None or f"check.yaml:{line}:" in message
    for part in (key, what, remedy):
        assert part in message


# a key with a line of its own: a value, and what is said of it
OUT_OF_RANGE = {
    "training.lr_backbone": ("-1e-3", "must lie in (0, 1e30], got -0.001"),
    "training.lr_last_layer": ("0", "must lie in (0, 1e30], got 0.0"),
    "training.batch_size": ("1", "must lie in 2..100000 (batch norm needs two films), got 1"),
    "training.coefficient_l1": ("1e31", "must lie in -1e30..1e30, got 1e+31"),
    "training.epochs": (
        "3",
        "at least 10, else no projection would ever happen (or set training.projection_interval to at most 3), got 3",
    ),
    "images.size": ("8", "must lie in 32..2048 pixels, got 8"),
    "explain.mask_share": ("2", "must lie in 0.01..0.99, got 2.0"),
    "sources.H2.settings.tag_visibility": ("1.5", "must lie in 0..1, got 1.5"),
    "sources.H2.settings.healthy_share": ("-0.1", "must not be negative, got -0.1"),
    "sources.H2.settings.tag_association": ("0.5", "with tag_share = 1.0, got 0.5"),
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_setting_out_of_its_range_is_named_with_its_own_line_and_value(key: str, tmp_path: Path) -> None:
    value, what = OUT_OF_RANGE[key]
    tree = yaml.safe_load(BASE)
    tree["sources"]["H2"]["settings"] = {"look": "south"}
    tree |= {"training": {"warm_epochs": 1}, "images": {"resize": "letterbox"}, "explain": {"top_k": 3}}
    *section, leaf = key.split(".")
    below = tree
    for name in section:
        below = below[name]
    below[leaf] = "HERE"
    text = yaml.safe_dump(tree, sort_keys=False).replace("HERE", value)
    line = 1 + next(n for n, t in enumerate(text.splitlines()) if t.strip() == f"{leaf}: {value}")
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path}/check.yaml:{line}: {key}: ")
    assert what in message
    del below[leaf]
    assert refusal(tmp_path, yaml.safe_dump(tree), f"{key}={value}").startswith(f"--set {key}: {key}: ")


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_the_example_of_an_override_suits_every_experiment(file: Path) -> None:
    assert load_experiment(file, ["training.epochs=12"]).training.epochs == 12


SOURCES = {
    "an unknown kind": ("H2: {kind: phantm}", "sources.H2", "phantom"),
    "no kind": ("H2: {root: a}", "sources.H2", "add `kind:`, one of nih, chexpert, manifest, dicom, phantom"),
    "a missing key": ("H2: {kind: nih}", "sources.H2.root", "required"),
    "an unknown key": ("H2: {kind: nih, root: a, tabel: b}", "sources.H2.tabel", "did you mean `table`?"),
    "an unknown key below": (
        "H2: {kind: manifest, root: a, table: b, columns: {image: a, patient: b, findngs: c}}",
        "columns.findngs",
        "did you mean `findings`?",
    ),
    "a third source": ("H2: {kind: phantom}\n  H3: {kind: phantom}", "sources", "2"),
    "an odd name": ("'H 2': {kind: phantom}", "sources", "letters, digits"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_source_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    entry, key, remedy = SOURCES[name]
    message = refusal(tmp_path, BASE.replace("H2: {kind: phantom}", entry))
    assert "check.yaml:" in message
    assert key in message
    assert remedy in message


def test_negatives_of_a_source_that_does_not_exist_are_refused(tmp_path: Path) -> None:
    message = refusal(
        tmp_path, BASE.replace("{positive: pneumonia}", "{positive: pneumonia, negatives: {H3: no_finding}}")
    )
    assert "tasks.pneumonia.negatives: no such source 'H3'" in message
    assert "['H1', 'H2']" in message


def test_a_task_of_an_unknown_finding_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE.replace("{positive: pneumonia}", "{positive: pneumnia}"))
    assert "check.yaml:6" in message
    assert "pneumonia" in message.split("pneumnia", 1)[1]


@pytest.mark.parametrize("file", ["mlflow.db", "/tmp/my runs/mlflow.db", "runs/mlflow.db?timeout=9", "m"])
def test_a_database_is_named_by_its_file(file: str, tmp_path: Path) -> None:
    for kind in ("sqlite", "sqlite+pysqlite"):
        assert load(tmp_path, BASE + f"tracking: {{uri: '{kind}:///{file}'}}\n").tracking.uri == f"{kind}:///{file}"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_numbers_in_every_spelling_are_numbers(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, BASE + f"training: {{lr_backbone: {text}}}\n").training.lr_backbone == 1e-4


def test_overrides_replace_and_make_sections(tmp_path: Path) -> None:
    study = load(tmp_path, BASE, "training.epochs=30", "seeds=[0,1]", "model.backbone=resnet18", "storage=s3://b/p")
    assert (study.training.epochs, study.seeds, study.model.backbone) == (30, (0, 1), "resnet18")
    assert study.storage == "s3://b/p"


OVERRIDES = {
    "training.epochs=lots": ("--set training.epochs", "integer"),
    "training.epoch=3": ("training.epoch", "did you mean `epochs`?"),
    "training.epochs": ("key=value", "--set training.epochs=12"),
    "=3": ("key=value", "--set"),
    "name.x=3": ("name", "section"),
    "mixtures=[0,": ("--set mixtures", "not valid YAML"),
    "mixtures=[0,101]": ("mixtures", "100"),
    "training..epochs=3": ("--set", "key"),
    "seeds.0=3": ("--set seeds.0", "list"),
    "axes.model.backbone=[vgg]": ("--set axes.model.backbone", "resnet50"),
    "search.trials=3": ("search.space", "required"),
    "sources.H3={kind: phantom}": ("with --set sources.H3", "must have at most 2 entries"),
    "sources.H1.settings.patients=0": (
        "--set sources.H1.settings.patients: sources.H1.settings.patients: must lie",
        "got 0",
    ),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_override_is_refused_by_its_name(override: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE, override)
    for part in OVERRIDES[override]:
        assert part in message


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, BASE + "mixtres: [0]\ntraining: {epochs: many}\n")
    assert "check.yaml:7: mixtres" in message
    assert "check.yaml:8: training.epochs" in message


@pytest.mark.parametrize("content", [b"", b"- a\n", b"just text", b"\xff\xfe\x00x", b"a: \x00b"])
def test_a_file_that_is_no_mapping_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "check.yaml"
    file.write_bytes(content)
    with pytest.raises(StudyError, match=r"check\.yaml") as caught:
        load_experiment(file)
    assert caught.value.remedy


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(StudyError, match="cannot read") as caught:
            load_experiment(path)
        assert "experiments/demo.yaml" in str(caught.value.remedy)


HOSTILE = {
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "a list in itself": "notes: &a [*a]\n",
    "a mapping in itself": "model: &a {backbone: *a}\n",
    "deep nesting": "notes: " + "[" * 5000 + "]" * 5000 + "\n",
    "a set": "notes: !!set {a, b}\n",
    "bytes": "notes: !!binary aGVsbG8=\n",
    "not a number": "training: {weight_decay: .nan}\n",
    "infinity": "training: {weight_decay: .inf}\n",
    "a huge integer": "study_seed: 1" + "0" * 5000 + "\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is a mapping": "? {a: b}\n: 1\n",
    "a key that is nothing": "~: 1\n",
    "a merge of no mapping": "model: {<<: 3}\n",
    "two documents": "---\nname: b\n",
    "base 60": "study_seed: 1:20:00\n",
    "a lone surrogate": 'name: "\\ud800"\n',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_hostile_yaml_is_refused_like_any_other(name: str, tmp_path: Path) -> None:
    text = HOSTILE[name]
    refusal(tmp_path, text if name == "a lone surrogate" else BASE + text)


keys = st.sampled_from([*Experiment.model_fields, "kind", "epochs", "H1", "pneumonia", "<<", "", "1", "null"])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=3)
)
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys | st.integers(), t, max_size=4), max_leaves=12
)
scraps = st.lists(
    st.sampled_from(
        [
            "name: a",
            "\n",
            "  ",
            "- ",
            ": ",
            "{",
            "}",
            "[",
            "]",
            "&a ",
            "*a",
            "!!int ",
            "? ",
            "|",
            ">",
            "'",
            '"',
            "#",
            "~",
        ]
        + [f"{k}:" for k in Experiment.model_fields]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(keys | st.integers() | st.none() | st.booleans(), trees, max_size=5),
    text=scraps,
    base=st.booleans(),
)
def test_any_text_is_an_experiment_or_a_refusal(tree: dict[str, object], text: str, base: bool, tmp_path: Path) -> None:
    for content in (yaml.safe_dump({**(yaml.safe_load(BASE) if base else {}), **tree}), (BASE if base else "") + text):
        message = outcome(tmp_path, content)
        assert "check.yaml" in message or not message


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.lists(keys, min_size=1, max_size=3).map(".".join), value=trees.map(yaml.safe_dump) | scraps)
def test_any_override_is_taken_or_refused(key: str, value: str, tmp_path: Path) -> None:
    message = outcome(tmp_path, BASE, f"{key}={value}")
    assert "check.yaml" in message or "--set" in message or not message
