"""The report from a finished study directory: three tables, figures, and one page that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from PIL import Image

from raystudy.errors import StudyError
from raystudy.report.cohort_table import cohort_table
from raystudy.report.page import Written, planted_truth, write_report
from raystudy.results import write_sealed
from raystudy.storage import Storage
from raystudy.study import Study
from tests.tiny_study import TinyStudy

KEYS = ["study", "trial_id", "task", "h1_share", "seed", "cohort_seed"]
TEST_SETS = {"Test-100H1", "Test-100H2", "Test-50-50"}


Reported = tuple[Study, Written]


@pytest.fixture(scope="module")
def reported(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A finished study of mixtures 0, 50 and 100 with its report, to be read only."""
    study = copied(tiny_study, tmp_path_factory.mktemp("reported"))
    return study, write_report(study)


@pytest.fixture
def study(tiny_study: TinyStudy, tmp_path: Path) -> Study:
    """The same study without a report and without films, to be changed at will."""
    study = tiny_study.copy(tmp_path)
    study.storage.delete_tree("report")
    return study


def copied(tiny_study: TinyStudy, root: Path) -> Study:
    shutil.copytree(Path(tiny_study.study.storage.uri).parent / "_images", root / "_images")
    return tiny_study.copy(root)


def table(study: Study, name: str) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(study.storage.read_bytes(f"report/tables/{name}.csv")))


def page(study: Study) -> str:
    return study.storage.read_bytes("report/index.html").decode()


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tables_have_the_columns_that_others_rely_on(reported: Reported):
    study, _ = reported
    numbers = ["accuracy", "accuracy_low", "accuracy_high", "auroc", "auroc_low", "auroc_high"]
    assert list(table(study, "accuracy").columns) == [*KEYS, "test_set", "n", "correct", *numbers]
    drop_and_increase = [f"{n}{e}" for n in ("average_drop", "average_increase") for e in ("", "_low", "_high")]
    wanted = [*KEYS, "test_set", "method", "n_images", "n_pairs", *drop_and_increase]
    assert list(table(study, "faithfulness").columns)[: len(wanted)] == wanted
    wanted = [f"{n}{e}" for n in ("source_reliance", "skill") for e in ("", "_low", "_high")]
    assert list(table(study, "reliance").columns)[-7:] == ["seeds", *wanted]
    assert {"study", "task", "h1_share", "cohort_seed"} <= set(table(study, "reliance").columns)


def test_captions_tell_the_settings_that_the_explanations_were_made_with(study: Study) -> None:
    experiment = yaml.safe_load(study.storage.read_bytes("experiment.yaml"))
    experiment["explain"] |= {"mask_share": 0.25, "superposition": "unit_sum"}
    study.storage.write_bytes("experiment.yaml", yaml.safe_dump(experiment).encode())
    write_report(study)
    assert "with 50 % of the film masked" in page(study)
    assert "scaled to its maximum, averaged over the class" in page(study)


def replan(study: Study, **changes: object) -> None:
    """Change the plan of a study as a later run of another experiment would."""
    plan = {k: v for k, v in study.plan().items() if k not in ("sha256", "checksum")}
    write_sealed(study.storage, "plan.json", plan | changes, ())


def respecify(directory: Storage, **changes: object) -> None:
    """Change what a finished trial was, in its spec and where its result repeats it."""
    directory.write_json("spec.json", directory.read_json("spec.json") | changes)
    result = directory.read_json("result.json")
    files = list(result.pop("sha256"))
    del result["checksum"]
    write_sealed(directory, "result.json", result | {k: v for k, v in changes.items() if k in result}, files)


def with_a_second_seed(study: Study) -> dict[str, str]:
    """Copy every trial as one of seed 1; return new id by old one."""
    plan, others = study.plan(), {t: t.replace("seed0", "seed1") for t in study.trial_ids()}
    for old, new in others.items():
        source, target = study.trial(old), study.trial(new)
        for name in source.list():
            target.write_bytes(name, source.read_bytes(name))
        respecify(target, seed=1, trial_id=new)
    more = {key: plan[key] | {new: plan[key][old] for old, new in others.items()} for key in ("explain", "rows")}
    replan(study, trials=[*others, *others.values()], **more)
    return others


LONG = "/".join(["胸部" * 30] * 4)


@pytest.mark.parametrize(
    ("values", "spelt"),
    [
        (("../../w.safetensors", "../..-w.safetensors"), ".._.._w.safetensors"),
        ((f"{LONG}/1.safetensors", f"{LONG}/2.safetensors"), "胸部" * 11 + "胸"),
    ],
    ids=["alike", "long"],
)
def test_figures_of_axis_values_that_are_paths_have_names_of_their_own(
    values: tuple[str, str], spelt: str, study: Study
) -> None:
    """The copies of seed 1 become another arm; but for a sign, both values are spelt alike in a file name."""
    others = with_a_second_seed(study)
    for ids, value in zip((others, others.values()), values, strict=True):
        for trial_id in ids:
            respecify(study.trial(trial_id), seed=0, axes={"model.weights": value})
    written = write_report(study)
    assert len(written.sentences) == 2
    names = [n for n in written.files if n.startswith("report/figures/accuracy_") and n.endswith(".png")]
    assert len(names) == 2
    assert all(n.startswith(f"report/figures/accuracy_pneumonia_{spelt}_") for n in names)
    assert set(study.storage.list("report")) == set(written.files)


def test_every_interval_says_how_many_training_runs_it_covers(study: Study) -> None:
    others = with_a_second_seed(study)
    write_report(study)
    text = " ".join(Tags(page(study)).text.split())
    assert "3 mixtures, 2 training runs each" in text
    assert "conditional on this training run." not in text.partition("How to read this page")[0]
    assert "training run: their intervals" not in text
    assert "Means over 2 training runs a mixture" in text
    lost = next(new for new in others.values() if "h1_100" in new)
    study.trial(lost).delete("result.json")
    write_report(study)
    text = " ".join(Tags(page(study)).text.split())
    assert "3 mixtures, 1 to 2 training runs each" in text
    mixed = "over training runs and patients; where a mixture has one training run, conditional on it"
    assert text.count(mixed) >= 4  # accuracy, reliance, AD/AI, and its table
    assert "Some mixtures have one training run: their intervals are conditional on it" in text
    assert "Means over 1 to 2 training runs a mixture" in text


def test_explanations_with_other_settings_are_no_part_of_the_page(study: Study) -> None:
    """Some trials have been explained anew, some not yet: what the plan does not ask for is left out and told."""
    others = with_a_second_seed(study)
    plan = study.plan()
    explain = {t: dict(jobs) for t, jobs in plan["explain"].items()}
    waits = [*others.values(), next(t for t in others if "h1_050" in t)]
    for trial_id in waits:
        explain[trial_id]["faithfulness"] = "faithfulness-00000000"
    replan(study, explain=explain)
    write_report(study)
    rows = table(study, "faithfulness_by_mixture")
    assert set(rows["h1_share"]) == {0, 100}
    assert set(rows["seeds"]) == {1}
    text = " ".join(Tags(page(study)).text.split())
    assert "4 of 6 finished trials are not explained as the experiment asks" in text
    assert waits[0] in text


def test_what_the_plan_no_longer_has_leaves_the_report(study: Study) -> None:
    ids = study.trial_ids()
    study.storage.write_bytes("report/figures/accuracy_another_task.png", b"old")
    study.storage.write_bytes("report/tables/planted_truth.csv", b"old")
    replan(study, trials=ids[:2])
    written = write_report(study)
    assert set(study.storage.list("report")) == set(written.files)
    found = cohort_table(study, study.trial_ids(), ["H1", "H2"], ["no pneumonia", "pneumonia"])
    assert found is not None
    assert {row[0] for row in found["rows"]} == {"0H1-100H2", "50H1-50H2", "test"}


def test_both_methods_are_compared_film_by_film(reported: Reported) -> None:
    study, _ = reported
    rows = table(study, "faithfulness_by_mixture").set_index(["h1_share", "method"])
    for share in (0, 50, 100):
        prp, other, difference = (rows.loc[(share, m)] for m in ("prp", "protopnet", "prp-protopnet"))
        assert difference["average_drop"] == pytest.approx(prp["average_drop"] - other["average_drop"])
        assert difference["average_drop_low"] <= difference["average_drop"] <= difference["average_drop_high"]
    assert "PRP − ProtoPNet" in Tags(page(study)).text


def test_accuracy_is_what_the_predictions_say_and_lies_in_its_interval(reported: Reported):
    study, _ = reported
    rows = table(study, "accuracy")
    assert len(rows) == 9  # three mixtures, three test sets
    for _, row in rows.iterrows():
        predictions = study.trial(row["trial_id"]).read_table("predictions.parquet").to_pandas()
        mine = predictions[predictions["test_set"] == row["test_set"]]
        assert row["n"] == len(mine)
        assert row["correct"] == (mine["predicted"] == mine["label"]).sum()
        assert row["accuracy"] == pytest.approx(100 * row["correct"] / row["n"])
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 100


def test_reliance_is_half_the_story_of_the_accuracies(reported: Reported):
    study, _ = reported
    accuracy = table(study, "accuracy").pivot_table(index="h1_share", columns="test_set", values="accuracy")
    rows = table(study, "reliance").set_index("h1_share")
    one, two = accuracy["Test-100H1"], accuracy["Test-100H2"]
    assert rows["source_reliance"].to_list() == pytest.approx(((one - two) / 100).to_list())
    assert rows["skill"].to_list() == pytest.approx(((one + two) / 100 - 1).to_list())


def test_drop_and_increase_are_reported_for_every_method_on_the_mixtures_own_test_set(reported: Reported):
    study, _ = reported
    rows = table(study, "faithfulness")
    assert set(rows["method"]) == {"protopnet", "prp", "random"}
    by_share = rows.groupby("h1_share")["test_set"].unique().map(list).to_dict()
    assert by_share == {0: ["Test-100H2"], 50: ["Test-50-50"], 100: ["Test-100H1"]}
    assert (rows["n_images"] > 0).all()
    assert (rows["n_pairs"] >= rows["n_images"]).all()


def test_the_page_opens_with_the_answer_its_numbers_and_interval(reported: Reported):
    study, written = reported
    text = " ".join(Tags(page(study)).text.split())
    assert len(written.sentences) == 1
    assert written.sentences[0] in text
    assert text.index(written.sentences[0]) < text.index("How to read this page")
    assert "95 % interval" in text
    assert "conditional on this training run" in text  # one seed
    assert "3 mixtures, 1 training run each; films Test-100H1: n = 12, Test-100H2: n = 12, Test-50-50: n = 12." in text
    assert written.page in written.text()


def test_the_page_counts_who_was_trained_and_tested_on(reported: Reported):
    study, _ = reported
    found = cohort_table(study, study.trial_ids(), ["H1", "H2"], ["no pneumonia", "pneumonia"])
    assert found is not None
    assert found["columns"][2:6] == ["pneumonia, H1", "pneumonia, H2", "no pneumonia, H1", "no pneumonia, H2"]
    rows = {tuple(row[:2]): [int(cell) for cell in row[2:]] for row in found["rows"]}
    # 12 films a class to train on, 6 to validate and test; every patient of the tiny study has one film
    assert rows["0H1-100H2", "train"] == [0, 12, 12, 0, 24, 24]
    assert rows["50H1-50H2", "val"] == [3, 3, 3, 3, 12, 12]
    assert rows["test", "Test-100H1"] == [6, 0, 0, 6, 12, 12]
    assert len(rows) == 3 * 2 + 3
    assert "Who was trained and tested on" in Tags(page(study)).text


def test_the_page_needs_no_other_file_no_network_and_no_script(reported: Reported):
    study, _ = reported
    html = page(study)
    tags = Tags(html).tags
    pictures = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(pictures) == 7  # accuracy, reliance, faithfulness, class maps, two top-image panels, prototypes
    for source in pictures:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert min(picture.size) > 200
            assert any(low != high for low, high in picture.convert("RGB").getextrema())
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "object")]
    assert not re.search(r"""(?:href|src|url)\s*[=(]\s*["']?(?:https?:)?//""", html)


def test_figures_are_there_as_png_and_as_well_formed_svg(reported: Reported):
    study, written = reported
    names = {f.removeprefix("report/figures/") for f in written.files if "/figures/" in f}
    assert {Path(n).stem for n in names if n.endswith(".svg")} == {Path(n).stem for n in names if n.endswith(".png")}
    for name in names:
        data = study.storage.read_bytes(f"report/figures/{name}")
        if name.endswith(".svg"):
            assert ElementTree.fromstring(data).tag.endswith("svg")
        else:
            Image.open(io.BytesIO(data)).verify()
    assert set(written.files) <= set(study.storage.list())


def test_the_same_study_gives_the_same_bytes(reported: Reported):
    study, written = reported
    names = written.files
    before = {name: study.storage.read_bytes(name) for name in names}
    assert write_report(study).files == names
    assert {name: study.storage.read_bytes(name) for name in names} == before


def test_a_study_without_explanations_is_reported_without_panels(study: Study):
    for trial_id in study.trial_ids():
        study.trial(trial_id).delete_tree("explain")
    written = write_report(study)
    assert not [name for name in written.files if "films_" in name or "faithfulness" in name]
    assert len([1 for tag, _ in Tags(page(study)).tags if tag == "img"]) == 2


def test_a_study_whose_films_are_gone_keeps_its_numbers_and_class_maps(study: Study):
    written = write_report(study)  # the copy has no image store beside it
    panels = {Path(name).stem for name in written.files if "films_" in name}
    assert panels == {"films_class_maps_pneumonia"}
    assert "raystudy prepare" in Tags(page(study)).text


def test_a_trial_without_a_result_is_named_and_left_out_of_the_numbers(study: Study):
    lost = study.trial_ids()[1]
    study.trial(lost).delete("result.json")
    write_report(study)
    assert lost not in set(table(study, "accuracy")["trial_id"])
    text = Tags(page(study)).text
    assert "2 of 3 trials finished" in " ".join(text.split())
    assert lost in text


DAMAGED = {
    "broken": (b"a: [", "not valid YAML"),
    "another file": (b"name: x\n", "lacks study_seed"),
    "text": (b"hello", "lacks study_seed"),
    "gone": (None, "missing"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_experiment_of_a_study_is_named(how: str, study: Study) -> None:
    content, why = DAMAGED[how]
    if content is None:
        study.storage.delete("experiment.yaml")
    else:
        study.storage.write_bytes("experiment.yaml", content)
    with pytest.raises(StudyError, match=why) as refusal:
        write_report(study)
    assert "experiment.yaml" in str(refusal.value)


@pytest.mark.parametrize("plan", [{}, [], {"trials": 3}])
def test_a_plan_without_trials_is_named(plan: object, study: Study) -> None:
    study.storage.write_json("plan.json", plan)
    with pytest.raises(StudyError, match=r"plan\.json: the file is damaged"):
        study.require().status()


def test_relevance_that_does_not_reach_the_film_is_told_and_counted() -> None:
    columns = ["trial_id", "h1_share", "prototype", "image_id", "multiplicity", "mask", "positive_share", "area_share"]
    rows = [("t", 90, 0, "a", 3, "sign", float("nan"), 0.1), ("t", 90, 0, "a", 3, "tag", float("nan"), 0.2)]
    rows += [("t", 90, 1, "b", 1, "sign", 0.3, 0.1), ("t", 90, 1, "b", 1, "tag", 0.1, 0.2)]
    rows += [("t", 90, 2, "c", 1, "sign", 0.3, 0.1)]
    rows += [("t", 100, 0, "a", 1, "sign", float("nan"), 0.1), ("t", 100, 0, "a", 1, "tag", 0.0, 0.0)]
    table = planted_truth(pd.DataFrame(rows, columns=columns))
    assert table["rows"] == [
        ["90H1-10H2", "30.0 %", "10.0 %", "3.0 ×", "2 / 2", "10.0 %", "20.0 %", "0.5 ×", "1 / 1", "1"],
        ["100H1-0H2", "–", "–", "–", "1 / 1", "–", "–", "–", "0 / 0", "1"],
    ]


def test_a_study_without_any_result_is_refused_with_the_remedy(study: Study):
    for trial_id in study.trial_ids():
        study.trial(trial_id).delete("result.json")
    with pytest.raises(StudyError, match="nothing to report") as refusal:
        write_report(study)
    assert "raystudy run" in str(refusal.value)


def test_notes_of_the_experiment_are_printed_and_cannot_inject_markup(study: Study):
    tree = yaml.safe_load(study.storage.read_bytes("experiment.yaml"))
    tree["notes"] = ["Children & adults <script>alert(1)</script>"]
    study.storage.write_bytes("experiment.yaml", yaml.safe_dump(tree).encode())
    write_report(study)
    assert "Children & adults <script>alert(1)</script>" in Tags(page(study)).text
    assert "<script" not in page(study)


@pytest.mark.parametrize("width", [1200, 420])
def test_nothing_is_cut_off_at_the_side_in_a_browser(reported: Reported, tmp_path: Path, width: int):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium (Debian package) is not installed")
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
    (tmp_path / "page.html").write_text(page(reported[0]).replace("</body>", f"{probe}</body>"))
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    switches += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [browser, *switches, f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    html = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(\d+) (\d+)</title>", html)
    assert title is not None
    assert int(title[1]) <= int(title[2])  # the page is not wider than the window


def test_every_number_of_the_page_has_its_n(reported: Reported):
    study, _ = reported
    by_mixture = table(study, "accuracy_by_mixture")
    assert (by_mixture["n"] > 0).all()
    assert set(by_mixture["test_set"]) == TEST_SETS
    assert (by_mixture["seeds"] == 1).all()
    assert (by_mixture["interval"] == "conditional on this training run").all()
    text = " ".join(Tags(page(study)).text.split())
    faithfulness = table(study, "faithfulness_by_mixture")
    assert len(faithfulness) == 12  # three mixtures, three methods and their difference
    for _, row in faithfulness.iterrows():
        form = "+.1f" if row["method"] == "prp-protopnet" else ".1f"
        for name in ("average_drop", "average_increase"):
            number, low, high = (f"{row[f'{name}{end}']:{form}}".replace("-", "−") for end in ("", "_low", "_high"))
            assert f"{number} ({low} to {high})" in text
        assert f"{row['n_images']} / {row['n_pairs']}" in text
    specificity = table(study, "specificity").groupby("rule")[["n_same_cell", "n_shuffled"]].sum()
    for n in specificity["n_shuffled"]:
        assert f"n = {n}" in text
    assert (faithfulness["interval"] == "conditional on this training run").all()
    assert text.count("conditional on this training run") >= 4  # accuracy, reliance, faithfulness: figure and table
    assert "nan" not in text
