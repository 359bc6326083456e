"""What the summaries say of winners and differences, computed again from the results files."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from concord.model import bundle
from concord.training import config_file
from concord.training.evaluation.requests import request_scores
from concord.training.reports.effects import class_scores, effect_scores
from concord.training.reports.held_out import EQUAL, choose_beta
from concord.training.reports.summary import average, finished_rows, row_name
from concord.training.reports.tables import pair_scores
from tests.support.server import ROOT

RESULTS = ROOT / "training" / "results"
CONFIGS = ROOT / "training" / "configs"
CLASSES = ("gender", "article", "colour", "season", "usage")


def text(file: Path, heading: str) -> str:
    """The section of a document, each paragraph and item on one line."""
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", file.read_text(), re.MULTILINE | re.DOTALL)
    return re.sub(r"\s+", " ", found)


@pytest.fixture(scope="module")
def summary() -> str:
    return text(RESULTS / "README.md", "Summary")


def evaluations(folder: str, model: str = "concord") -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((RESULTS / folder).glob(f"{model}-*.json"))]


def mean(runs: list[dict[str, Any]], title: str) -> float:
    return statistics.fmean(pair_scores(run)[title][0] for run in runs)


def deviation(runs: list[dict[str, Any]], title: str) -> float:
    return statistics.stdev(pair_scores(run)[title][0] for run in runs)


def test_recall_in_the_shop_is_that_of_its_files(summary: str) -> None:
    values = [mean(evaluations("fashion", model), "photo by title, recall@10") for model in ("concord", "contrastive")]
    assert values[0] > values[1]
    assert f"photographs by titles with a recall@10 of {values[0]:.2f}, a contrastive model with {values[1]:.2f}" in summary
    readme = text(ROOT / "README.md", "Results")
    assert f"(recall@10 {values[0]:.2f} instead of {values[1]:.2f})" in readme


def test_recall_on_birds_is_higher_in_the_stated_number_of_rows(summary: str) -> None:
    concord, contrastive = (evaluations("birds-features-contrast", name) for name in ("concord", "contrastive"))
    titles = [title for title in pair_scores(concord[0]) if "recall@10" in title]
    spreads = {title: max(deviation(concord, title), deviation(contrastive, title)) for title in titles}
    gains = {title: mean(concord, title) - mean(contrastive, title) for title in titles}
    higher = {title for title in titles if gains[title] > spreads[title]}
    assert not any(gains[title] < -spreads[title] for title in titles)
    assert (len(higher), len(titles)) == (6, 9)
    assert "its recall is higher in six of nine rows, and equal in three" in summary
    pairs = [title for title in titles if "others" not in title]
    assert (len(higher.intersection(pairs)), len(pairs)) == (4, 6)
    assert "birds in four of six pairs of modalities" in text(ROOT / "README.md", "Results")


def test_recall_on_flickr8k_is_equal_within_the_spread(summary: str) -> None:
    concord, contrastive = (evaluations("flickr8k", model) for model in ("concord", "contrastive"))
    for title in ("photo by caption, recall@10", "caption by photo, recall@10"):
        spread = max(deviation(concord, title), deviation(contrastive, title))
        assert abs(mean(concord, title) - mean(contrastive, title)) < spread
    assert "On Flickr8k, whose rows are all complete, the two are equal" in summary
    (linear,) = (run["linear"] for run in concord + contrastive if "linear" in run)
    title = "photo by caption, recall@10"
    assert abs(mean(concord, title) - pair_scores(linear)[title][0]) < deviation(concord, title)
    assert "and canonical correlation analysis finds photographs equally often" in summary


def test_linear_models_are_better_where_the_summary_says_so(summary: str) -> None:
    runs = evaluations("fashion")
    (linear,) = (run["linear"] for run in runs if "linear" in run)
    wins = {}
    for source in ("photo", "title", "others"):
        titles = [f"{name} from {source}, accuracy" for name in CLASSES]
        wins[source] = [mean(runs, title) > pair_scores(linear)[title][0] for title in titles]
    assert all(wins["photo"])
    assert sum(wins["title"]) == 1
    assert not any(wins["others"])
    assert "predicts all five classes of the shop from photographs better than linear models do" in summary
    assert "one of them from titles" in summary
    assert "and none from all other modalities" in summary
    birds = evaluations("birds-features-contrast")
    (linear,) = (run["linear"] for run in birds if "linear" in run)
    gains = {}
    for source in ("photo", "caption"):
        title = f"attributes from {source}, mean average precision"
        gains[source] = (pair_scores(linear)[title][0] - mean(birds, title)) / deviation(birds, title)
    assert gains["photo"] > 1 > gains["caption"] > -1
    assert (
        "Ridge regression predicts attributes of birds from photographs slightly better, and from captions equally" in summary
    )


def test_partial_rows_improve_every_score_of_birds(summary: str) -> None:
    every, complete = (
        pair_scores(json.loads((RESULTS / "birds" / f"{name}.json").read_text())) for name in ("all", "complete")
    )
    titles = [title for title in every if "recall@10" in title or "mean average precision" in title]
    assert len(titles) > 8
    assert all(every[title][0] > complete[title][0] for title in titles)
    assert "Training on partial rows improves every score of birds" in summary


def test_winners_on_digits_are_those_of_the_results(summary: str) -> None:
    models = dict(finished_rows(json.loads((RESULTS / "digits.json").read_text())))
    del models["digits-version-6"]
    served, equal_noise = "concord", "digits-full-spread"

    def value(name: str, score: str) -> float:
        return average(models[name], score)[0] or 0.0

    def ranked(score: str, without: str = equal_noise) -> list[str]:
        names = [name for name in models if name != without]
        return sorted(names, key=lambda name: value(name, score), reverse=score != "frechet")

    assert ranked("probe")[:2] == [served, "mmvae"]
    assert value(served, "probe") - value("mmvae", "probe") < EQUAL
    assert "Concord has the highest probe, which MMVAE equals" in summary
    assert ranked("probe_two")[-1] == served
    below = [name for name in ranked("probe_two") if value(name, "probe_two") - value(served, "probe_two") > EQUAL]
    assert sorted(below) == ["mmvae", "mvtcae"]
    assert "With two modalities Concord has a lower probe than MMVAE and MVTCAE" in summary
    assert ranked("frechet")[0] == "mvtcae-beta-3"
    assert "MVTCAE has the lowest FD with β 3, not with the chosen β" in summary
    assert set(ranked("means_one")[:2]) == {served, "jmvae"}
    assert abs(value(served, "means_one") - value("jmvae", "means_one")) < EQUAL
    below = [name for name in ranked("means_more") if value(name, "means_more") - value(served, "means_more") > EQUAL]
    assert sorted(below) == ["mmvae", "mvtcae"]
    assert "equally often for Concord and JMVAE-kl, and from two less often for Concord than for MMVAE and MVTCAE" in summary
    assert ranked("coherence_one", served)[0] == "mmvae"
    assert value("mmvae", "coherence_one") - value(equal_noise, "coherence_one") < EQUAL
    assert "With equal noise, Concord is equal to MMVAE in coherence of samples from one modality" in summary
    assert ranked("coherence_more", served)[:2] == ["mvtcae", "jmvae"]
    assert "and behind MVTCAE and JMVAE-kl from two; it is second in FD" in summary
    assert ranked("frechet", served)[1] == equal_noise
    assert all(value(served, score) > value(equal_noise, score) for score in ("coherence_one", "coherence_more", "frechet"))
    assert "its coherence of samples is higher, and so is its FD" in summary
    assert {ranked("coherence_joint", without)[0] for without in (served, equal_noise)} == {served, equal_noise}
    assert "With its learned prior, its prior samples agree most often" in summary
    bounds = [value(name, "log_likelihood") for name in (served, "mvtcae-beta-3")]
    assert 0 < bounds[0] - bounds[1] < 2.5
    assert "Its bound of log p(X) differs from that of MVTCAE with β 3 by 2 nats, too little to rank them" in summary
    readme = text(ROOT / "README.md", "Results")
    assert len({ranked(score, served)[0] for score in ("probe", "coherence_more", "frechet")}) == 3
    assert "No model is best in every row" in readme


def test_three_seeds_of_a_third_of_the_budget_say_what_the_summary_says(summary: str) -> None:
    models = dict(finished_rows(json.loads((RESULTS / "digits-10000.json").read_text())))
    four = {name: rows for name, rows in models.items() if len(rows) == 3}
    assert four.keys() == {"concord", "jmvae", "mmvae", "mvtcae"}
    scores = ("probe", "means_one", "frechet", "cosine", "minutes")
    averages = {name: {score: average(rows, score)[0] or 0.0 for score in scores} for name, rows in four.items()}
    spreads = {name: {score: average(rows, score)[1] or 0.0 for score in scores} for name, rows in four.items()}
    own, others = averages["concord"], {name: of for name, of in averages.items() if name != "concord"}
    for score in ("probe", "means_one"):
        second = max(others, key=lambda name: others[name][score])
        assert second == "mmvae"
        assert own[score] - others[second][score] > max(spreads[name][score] for name in ("concord", second)), score
    figures = f"the highest probe ({own['probe']:.3f}, MMVAE {others['mmvae']['probe']:.3f})"
    assert f"Concord has {figures} and coherence of means from one modality" in summary
    bounds = {name: average(rows, "log_likelihood_best")[0] or 0.0 for name, rows in models.items()}
    assert sorted(bounds, key=lambda name: -bounds[name])[:3] == ["mvae", "concord", "jmvae"]
    lead = f"Concord the second, {bounds['concord'] - bounds['jmvae']:.0f} nats before JMVAE-kl"
    probe = average(models["mvae"], "probe")[0]
    assert f"MVAE has the highest bound of log p(X), with a probe of {probe:.3f}, and {lead}" in summary
    assert min(others, key=lambda name: others[name]["frechet"]) == "jmvae"
    assert 0 < own["frechet"] - others["jmvae"]["frechet"] < 2
    assert "JMVAE-kl has the lowest FD, and Concord the lowest cosine of the models with three seeds" in summary
    assert own["cosine"] < min(of["cosine"] for of in others.values())
    ratios = [own["minutes"] / of["minutes"] for of in others.values()]
    claim = f"At a third of the budget, it trains {min(ratios):.1f} to {max(ratios):.1f} times as long"
    assert claim in text(ROOT / "README.md", "Results")


def test_beta_of_every_model_is_that_chosen_on_held_out_rows() -> None:
    chosen = choose_beta([json.loads(file.read_text()) for file in (RESULTS / "held-out").glob("*.json")])
    assert chosen.keys() == {"concord", "jmvae", "mmvae", "mvtcae", "mvae", "mopoe", "jnf"}
    for model, beta in chosen.items():
        separate = CONFIGS / "baselines" / f"{model}.toml"
        config = config_file.read(separate if separate.exists() else CONFIGS / "digits.toml")
        assert config.objective.beta == beta, model


def differences(rows: Mapping[str, Mapping[int, Mapping[str, float]]], one: str, other: str, title: str) -> list[float]:
    """Of the seeds that both variants have."""
    seeds = sorted(rows[one].keys() & rows[other].keys())
    return [rows[one][seed][title] - rows[other][seed][title] for seed in seeds]


def test_effects_of_a_teacher_on_digits_are_those_of_the_results(summary: str) -> None:
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for row in json.loads((RESULTS / "ablations" / "digits-version-4-2000.json").read_text())["rows"]:
        rows.setdefault(row_name(row), {})[row["seed"]] = class_scores(row)

    def effect(title: str, one: str = "digits-gaussian", other: str = "digits-unrefined") -> float:
        values = differences(rows, one, other, title)
        assert len(values) == 3
        assert len({value > 0 for value in values}) == 1, "the sign is that of every seed"
        return statistics.fmean(values)

    assert f"A refined teacher raises the bound of log p(X) by {effect('log p(X), nats ↑'):.0f} nats" in summary
    assert f"lowers the FD by {-effect('FD of pictures ↓'):.0f}, and the cosine by {-effect('cosine ↑'):.2f}" in summary
    of_means = [effect(f"coherence of means, from {which} ↑") for which in ("one modality", "more")]
    assert f"coherence of means by {of_means[0]:.3f} from one modality and {of_means[1]:.3f} from two" in summary
    for title in ("coherence of samples, from one modality ↑", "coherence of samples, from more ↑"):
        spread = max(
            statistics.stdev(rows[name][seed][title] for seed in (0, 1, 2)) for name in ("digits-gaussian", "digits-unrefined")
        )
        assert 0 < effect(title) < spread
    narrow = ("digits-narrow", "digits-narrow-unrefined")
    best = [
        rows[narrow[0]][seed]["log p(X), best proposal, nats ↑"] - rows[narrow[1]][seed]["log p(X), best proposal, nats ↑"]
        for seed in (1, 2)
    ]
    of_means = [effect("coherence of means, from one modality ↑", *narrow)]
    gains = f"{effect('probe ↑', *narrow):.3f} of the probe, {of_means[0]:.3f} of coherence of means from one modality, "
    gains += f"and {effect('log p(X), nats ↑', *narrow):.0f} nats"
    best_gain = f"({statistics.fmean(best):.0f} nats with the best proposal, two seeds)"
    assert f"With networks a quarter as wide it adds {gains} {best_gain}" in summary
    teacher = ("digits-gaussian", "digits-unaligned")
    assert f"a model with a teacher has {effect('probe ↑', *teacher):.2f} more of the probe" in summary
    assert f"and an FD lower by {-effect('FD of pictures ↓', *teacher):.0f}" in summary
    readme = text(ROOT / "README.md", "Results")
    assert f"raises this bound by {effect('log p(X), nats ↑'):.0f} nats and coherence of means by 0.01 on digits" in readme
    assert 0.0075 < effect("coherence of means, from one modality ↑") < 0.015


def effects(name: str) -> dict[str, dict[int, dict[str, float]]]:
    """{variant: {seed: scores}} of the four models of a data set with ``pairing = "row"``."""
    folder, base = f"ablations/{name}", name.removesuffix("-1000")
    models = {"refined": "concord", **{variant: f"{base}-{variant}" for variant in ("unrefined", "unaligned")}}
    files = {variant: sorted((RESULTS / folder).glob(f"{model}-[0-9].json")) for variant, model in models.items()}
    return {
        variant: {int(file.stem[-1]): effect_scores(json.loads(file.read_text())) for file in found}
        for variant, found in files.items()
    }


def test_effects_of_a_teacher_on_real_data_are_those_of_the_results(summary: str) -> None:
    sets = {name: effects(name) for name in ("birds-features-contrast", "flickr8k", "fashion-1000")}
    changes, numbers = [], {}
    for name, rows in sets.items():
        assert len(differences(rows, "refined", "unrefined", "R² ↑")) >= 2
        found = [title for title in ("recall@10 ↑", "accuracy ↑", "probe ↑") if title in rows["refined"][0]]
        changes += [abs(statistics.fmean(differences(rows, "refined", "unrefined", title))) for title in found]
        numbers[name] = [statistics.fmean(differences(rows, "refined", other, "R² ↑")) for other in ("unrefined", "unaligned")]
    assert len(changes) == 6
    assert max(changes) < 0.0055
    assert "a refined teacher changes mean recall, classes and probe by 0.005 at most" in summary
    shop, flickr, birds = (numbers[name] for name in ("fashion-1000", "flickr8k", "birds-features-contrast"))
    assert f"it lowers R² of the year in the shop by {-shop[0]:.3f}" in summary
    assert f"A teacher at all lowers R² by {-shop[1]:.3f} in the shop and {-flickr[1]:.3f} on Flickr8k" in summary
    assert f"and raises it by {birds[1]:.3f} on birds" in summary
    readme = text(ROOT / "README.md", "Results")
    assert "On birds, Flickr8k and the shop it changes recall, classes and the probe by 0.005 at most" in readme
    assert f"In the shop, R² of the year falls by {-shop[0]:.3f}" in readme


def test_refinement_at_request_time_changes_what_the_summary_says(summary: str) -> None:
    metrics = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE)).manifest.metrics
    by_step = metrics["refined"]["coherence"]
    assert metrics["refinement"]["raised"] > 0.995
    assert "raises the ELBO of nearly every row of digits" in summary
    assert f"change their coherence from one modality from {by_step[0]:.3f} to {by_step[4]:.3f}" in summary
    runs = [request_scores(run) for run in evaluations("fashion")]
    for title, sign in (("log-likelihood, nats", 1), ("accuracy of classes", -1), ("R² of numbers", 1)):
        changes = [run[f"{title}, from 1 modality"][1] - run[f"{title}, from 1 modality"][0] for run in runs]
        assert all(sign * change > 0 for change in changes), title
    recall = [run["recall@10, from 1 modality"][1] - run["recall@10, from 1 modality"][0] for run in runs]
    assert min(recall) < 0 < max(recall)
    claim = "raises the likelihood of what is absent and R² of the year, lowers the accuracy of classes, and changes recall"
    assert f"{claim} in both directions" in summary
    for folder in ("ablations/birds-features-contrast", "flickr8k"):
        of_features = [request_scores(run) for run in evaluations(folder)]
        assert len(of_features) == 3
        for title in ("log-likelihood, nats", "R² of numbers"):
            changes = [run[f"{title}, from 1 modality"][1] - run[f"{title}, from 1 modality"][0] for run in of_features]
            assert min(changes) > 0, (folder, title)
    assert "On features of birds and of Flickr8k (three seeds each), with one modality, it raises likelihood and R²" in summary
    captions = evaluations("flickr8k-captions")
    for title in ("log-likelihood, nats", "R² of numbers"):
        changes = [request_scores(run)[f"{title}, from 1 modality"] for run in captions]
        assert all(by_step[1] > by_step[0] for by_step in changes), title
    of_photographs = [run["requests"]["present"]["1"]["recall@10"]["photo"] for run in captions]
    assert all(by_step[1] > by_step[0] for by_step in of_photographs)
    assert "whose posterior was not trained for search, it raises likelihood, R², and recall of photographs" in summary


def test_figures_of_generated_texts_are_those_of_the_files(summary: str) -> None:
    def average(folder: str, *keys: str) -> float:
        found: Any = [run["texts"] for run in evaluations(folder)]
        for key in keys:
            found = [run[key] for run in found]
        return statistics.fmean(found)

    for folder, name in (("birds-captions", "birds"), ("flickr8k-captions", "Flickr8k")):
        captions = (folder, "caption", "photo")
        ratio = average(*captions, "cider") / average(*captions, "cider_nearest")
        nats = average(*captions, "nats_shuffled") - average(*captions, "nats")
        assert f"{ratio:.2f} times for {name}" in summary
        assert f"{nats:.2f} nats a token for {name}" in summary
    titles = ("fashion-titles", "title", "photo")
    ratio = average(*titles, "cider") / average(*titles, "cider_nearest")
    assert f"of titles of the shop it is {ratio:.2f} times" in summary
    article = average("fashion-titles", "title", "photo", "of_mean", "classes", "article", "accuracy")
    assert f"name the kind of article in {article:.0%} of the rows".replace("%", " %") in summary
