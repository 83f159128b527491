"""What TensorBoard shows of real runs: the answers of a real server, and its pages in a real browser."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import ROOT, made_once, metrics

from launch.workers import free_ports
from models import tasks
from trainers import custom_loop, report, sweep
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve
from trainers.show import drawings as pictures
from trainers.show import graphs, profiles, summaries
from trainers.world import process
from trainers.world.private_api import layers_of

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PICTURES = os.environ.get("LOCKSTEP_PICTURES")


def code_of(script, arguments):
    """The exit code of a script's command line, in this process."""
    return process.run(lambda: script.main(script.settings_from(["script", *arguments])))


@pytest.fixture(scope="module")
def logdir(tmp_path_factory, data_dir):
    """Real runs: a classifier of images twice, a regressor, a language model."""
    return made_once(tmp_path_factory, "tensorboard-runs", lambda folder: make_runs(folder, data_dir))


def make_runs(folder, data_dir):
    settings = {"data_dir": str(data_dir), "log_every": 4, "eval_every": 8, "checkpoint_every": 0, "batch_size": 32}
    runs = {
        "first": {"model": "resnet,width=8", "train_steps": 24, "replicas": 2, "profile": "5:8", "histogram_every": 8},
        "second": {
            "model": "resnet,width=8",
            "train_steps": 24,
            "replicas": 2,
            "learning_rate": 1e-3,
            "histogram_every": 0,
        },
        "rows": {"model": "residual_regressor", "train_steps": 8},
        "words": {"model": "transformer,depth=1,heads=2,width=16", "train_steps": 2},
    }
    for name, flags in runs.items():
        custom_loop.train(resolve(Config(**settings, **flags, run_dir=str(folder / name))))


class Server:
    """A TensorBoard as launch/tensorboard.sh starts it, which answers once it has read every run."""

    def __init__(self, logdir: Path, port: int):
        self.url = f"http://127.0.0.1:{port}"
        subprocess.run([sys.executable, ROOT / "launch/environment.py", "tensorboard"], timeout=900, check=True)
        command = [str(ROOT / "launch/tensorboard.sh"), str(logdir), f"--port={port}"]
        # Read in a thread, a run has a name before it has values.
        command += ["--load_fast=false", "--reload_task=blocking", "--reload_interval=0"]
        path = logdir.with_name(f"tensorboard-{port}.log")
        with open(path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait(path)
        except BaseException:
            self.close()
            raise

    def _wait(self, log: Path) -> None:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                if "first/train" in self.get("/data/runs"):
                    return
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)

    def close(self) -> None:
        """Ends it, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def raw(self, path: str, body: bytes | None = None, **query: str) -> bytes:
        """The answer to a request, unpacked."""
        address = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(address, data=body)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=180) as answer:
            content = answer.read()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content

    def get(self, path: str, body: bytes | None = None, **query: str):
        """The answer as JSON."""
        return json.loads(self.raw(path, body, **query))


@pytest.fixture(scope="module")
def server(logdir):
    one = Server(logdir, free_ports(1)[0])
    yield one
    one.close()


def test_scalars_of_train_and_eval_have_one_name_and_the_values_of_metrics_jsonl(server, logdir):
    tags = server.get("/data/plugin/scalars/tags")
    for name in ("loss", "accuracy", "learning_rate", "gradient_norm", "parameter_norm", "update_norm"):
        assert name in tags["first/train"]
    assert {"loss", "accuracy", "f1"} <= tags["first/eval"].keys()
    for split in ("train", "eval"):
        lines = {line["step"]: line for line in metrics(logdir / "first") if line["split"] == split}
        for name in ("loss", "accuracy"):
            shown = server.get("/data/plugin/scalars/scalars", run=f"first/{split}", tag=name)
            assert [step for _, step, _ in shown] == sorted(lines)
            for _, step, value in shown:
                assert value == pytest.approx(lines[step][name], rel=1e-5)


def graph_of(server, run, **query):
    return server.raw("/data/plugin/graphs/graph", run=run, conceptual="false", **query).decode()


def test_the_graphs_tab_shows_the_forward_pass_first_and_the_steps_by_tag(server):
    info = server.get("/data/plugin/graphs/info")["first/train"]
    assert info["run_graph"]
    assert {"step of one replica", "step of all replicas"} <= info["tags"].keys()
    forward = graph_of(server, "first/train")
    for layer in ("resnet/stem/", "resnet/stage_1_block_1/conv_1/", "resnet/stage_3_block_1/", "resnet/logits/"):
        assert f'name: "{layer}' in forward
    assert "replica" not in forward and "_1_1" not in forward
    one = graph_of(server, "first/train", tag="step of one replica")
    for scope in ("resnet/stem/", "loss/", "gradients/resnet/", "all_reduce/", "optimizer/", "metrics/", "input/"):
        assert f'name: "{scope}' in one
    assert 'name: "replica_0/' not in one and 'name: "replica_1/' not in one and 'name: "while/' not in one
    whole = graph_of(server, "first/train", tag="step of all replicas")
    for scope in (
        "replica_0/resnet/stem/",
        "replica_1/resnet/stem/",
        "replica_1/gradients/",
        "all_reduce/",
        "optimizer/",
    ):
        assert f'name: "{scope}' in whole
    nodes, _, functions = whole.partition("\nlibrary {")
    assert 'op: "NoOp"' not in nodes and 'input: "^' not in nodes
    assert "tf.summary" in functions or "WriteSummary" in functions  # what the loop calls at its cadence is kept


def test_text_holds_the_run_card_the_profile_and_a_sample(server):
    card = server.get("/data/plugin/text/text", run="first/train", tag="run")[-1]["text"]
    assert "--learning_rate" in card and "parameters" in card and "<table>" in card
    found = server.get("/data/plugin/text/text", run="first/train", tag="profile/operations")[-1]["text"]
    assert "Conv2D" in found and "time a step" in found
    sample = server.get("/data/plugin/text/text", run="words/eval", tag="sample")[-1]["text"]
    assert "Given:" in sample and "Continued with:" in sample


def test_images_are_pngs_of_the_confusion_the_worst_and_the_predictions(server):
    tags = server.get("/data/plugin/images/tags")
    assert {"confusion_matrix", "worst_examples"} <= tags["first/eval"].keys()
    assert "predicted_over_true" in tags["rows/eval"]
    for run, tag in (
        ("first/eval", "confusion_matrix"),
        ("first/eval", "worst_examples"),
        ("rows/eval", "predicted_over_true"),
    ):
        meta = server.get("/data/plugin/images/images", run=run, tag=tag, sample="0")[-1]
        png = server.raw(f"/data/plugin/images/individualImage?{meta['query']}")
        assert png.startswith(b"\x89PNG")
        if PICTURES:
            Path(PICTURES, f"{tag}.png").write_bytes(png)


def test_histograms_of_weights_and_gradients_come_at_their_cadence(server):
    tags = server.get("/data/plugin/histograms/tags")["first/train"]
    weights = [tag for tag in tags if tag.startswith("weights/")]
    assert any("stem/kernel" in tag for tag in weights)
    assert len(weights) == len([tag for tag in tags if tag.startswith("gradients/")])
    shown = server.get("/data/plugin/histograms/histograms", run="first/train", tag=weights[0])
    assert [step for _, step, _ in shown] == [8, 16, 24]
    assert all(sum(count for *_, count in buckets) > 0 for _, _, buckets in shown)
    assert "second/train" not in server.get("/data/plugin/histograms/tags")


def test_pr_curves_of_each_class(server):
    tags = server.get("/data/plugin/pr_curves/tags")["first/eval"]
    assert len(tags) == 10
    curve = server.get("/data/plugin/pr_curves/pr_curves", run="first/eval", tag="precision_recall/3")["first/eval"][-1]
    # The plugin leaves out points that fall together.
    assert len(curve["precision"]) == len(curve["recall"]) > 5
    assert curve["recall"][0] == pytest.approx(1) and 0 <= min(curve["precision"]) <= max(curve["precision"]) <= 1


def test_hparams_compares_the_runs_with_their_last_evaluation(server, logdir):
    experiment = server.get("/data/plugin/hparams/experiment", b"{}")
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"learning_rate", "model", "optimizer", "batch_size"} <= names and "run_dir" not in names
    wanted = [{"tag": "accuracy"}]
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": wanted[0]}],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = server.get("/data/plugin/hparams/session_groups", json.dumps(body).encode())["sessionGroups"]
    shown = {}
    for group in groups:
        for session in group["sessions"]:
            for value in session["metricValues"]:
                if value["name"]["tag"] == "accuracy":
                    shown[session["name"]] = (group["hparams"]["learning_rate"], value["value"])
    for name, rate in (("first", 3e-3), ("second", 1e-3)):
        last = [line for line in metrics(logdir / name) if line["split"] == "eval"][-1]
        assert shown[f"{name}/eval"] == (pytest.approx(rate), pytest.approx(last["accuracy"], rel=1e-5))


def test_the_profile_has_tools(server):
    deadline, runs = time.monotonic() + 180, []
    while not runs and time.monotonic() < deadline:
        runs = server.get("/data/plugin/profile/runs")
        time.sleep(0.5)
    assert any(run.startswith("first/train/") for run in runs)
    tools = server.get("/data/plugin/profile/run_tools", run=runs[0])
    assert any("trace_viewer" in tool for tool in tools)


# ----------------------------------------------------------------------------------------------------------------------
# The same, as a person sees it.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed (Debian's packages chromium and chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1500,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    one = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    one.set_page_load_timeout(180)
    one.set_script_timeout(180)
    yield one
    one.quit()


# The text of a page, of the shadow roots of its components and of its frames of the same origin.
_TEXT = """
const texts = [];
const walk = (node) => {
  if (!node) return;
  if (node.nodeType === 3) texts.push(node.data);
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.tagName === 'IFRAME') { try { walk(node.contentDocument.body); } catch (e) {} }
  for (const child of node.childNodes || []) walk(child);
};
walk(document.body);
return texts.join(' ');
"""


def shows(browser, *words, seconds=180):
    """Waits until the page's text has all these words; returns it."""
    deadline = time.monotonic() + seconds
    while True:
        text = " ".join(browser.execute_script(_TEXT).split())
        missing = [word for word in words if word not in text]
        if not missing:
            return text
        assert time.monotonic() < deadline, f"the page never shows {missing}: {text[:2000]}"
        time.sleep(0.5)


# The shape of the box of a graph that bears a name.
_BOX = """
const find = (node) => {
  if (node.shadowRoot) { const found = find(node.shadowRoot); if (found) return found; }
  if (node.tagName === 'g' && node.getAttribute('data-name') === arguments[0]) return node;
  for (const child of node.children || []) { const found = find(child); if (found) return found; }
  return null;
};
const box = find(document.body);
return box && box.querySelector('.nodeshape rect');
"""


def opens(browser, name, *words):
    """Double-clicks a box of the graph until it shows these words: one that still moves is missed."""
    from selenium.common import WebDriverException
    from selenium.webdriver import ActionChains

    deadline = time.monotonic() + 240
    while True:
        try:
            shape, place = browser.execute_script(_BOX, name), None
            while shape and (now := shape.rect) != place:
                place = now
                time.sleep(1)
            ActionChains(browser).double_click(shape).perform()
            return shows(browser, *words, seconds=20)
        except (AssertionError, AttributeError, WebDriverException):
            assert time.monotonic() < deadline, f"no box is named {name}, or it does not open"
            time.sleep(0.5)


# The item of a menu.
_ITEM = """
const find = (node) => {
  if (node.shadowRoot) { const found = find(node.shadowRoot); if (found) return found; }
  if (node.tagName === 'PAPER-ITEM' && node.textContent.trim() === arguments[0]) return node;
  for (const child of node.children || []) { const found = find(child); if (found) return found; }
  return null;
};
const item = find(document.body);
if (item) item.click();
return item !== null;
"""


def chooses(browser, item):
    deadline = time.monotonic() + 180
    while not browser.execute_script(_ITEM, item):
        assert time.monotonic() < deadline, f"no menu has {item}"
        time.sleep(0.5)


def keep(browser, name):
    if PICTURES:
        time.sleep(2)
        browser.save_screenshot(str(Path(PICTURES, f"{name}.png")))


def leaves(browser):
    """Leaves the page; what it says of requests that its end cut off is nobody's."""
    browser.get("about:blank")
    browser.get_log("browser")


def errors_of_ours(browser):
    """Severe lines of the console, but for what pages ask of hosts that cannot be reached from here."""
    # The last: XProf's charts come from a host of Google's; what they would show stands in the Text tab.
    unreachable = ("net::ERR_", "fonts.g", "gstatic", "favicon", "google is not defined")
    lines = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    return [line for line in lines if not any(word in line for word in unreachable)]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("timeseries", ("loss", "accuracy", "gradient_norm", "first/train")),
        ("graphs", ("resnet", "Tag", "Default")),
        ("text", ("profile/operations", "Conv2D", "--learning_rate")),
        ("hparams", ("learning_rate", "accuracy", "first/eval")),
        ("images", ("confusion_matrix", "worst_examples")),
        ("histograms", ("weights/", "gradients/")),
        ("profile", ("first/train",)),
    ],
)
def test_a_page_shows_what_was_written(server, browser, page, words):
    leaves(browser)
    browser.get(f"{server.url}/#{page}")
    shows(browser, *words)
    keep(browser, page)
    assert errors_of_ours(browser) == []


def test_the_graph_opens_to_the_layers_and_the_tags_show_the_steps(server, browser):
    leaves(browser)
    browser.get(f"{server.url}/#graphs&run=first%2Ftrain")
    shows(browser, "resnet", "Default")
    chooses(browser, "step of all replicas")
    shows(browser, "replica_0", "replica_1", "all_reduce", "optimizer")
    keep(browser, "graph_step_all")
    chooses(browser, "step of one replica")
    shows(browser, "resnet", "loss", "gradients", "all_reduce", "optimizer")
    keep(browser, "graph_step_one")
    leaves(browser)
    browser.get(f"{server.url}/#graphs&run=first%2Ftrain")
    shows(browser, "resnet", "Default")
    opens(browser, "resnet", "stem", "stem_norm", "stage_1_block_1", "stage_2_block_1", "pool", "logits")
    keep(browser, "graph_opened")
    assert errors_of_ours(browser) == []


def test_a_graph_of_a_hundred_layers_opens(browser, tmp_path):
    """ResNet-50 has 107 layers with weights: the page answers while its graph is shown."""
    model, _ = tasks.model_of("resnet50", tasks.DataSpec("classification", (8, 8, 1), num_classes=10))
    model(tf.zeros([1, 8, 8, 1]))
    graph = graphs.forward(model, tf.TensorSpec([1, 8, 8, 1]), lambda images: images)
    (tmp_path / "first/train").mkdir(parents=True)
    with contextlib.closing(summaries.Summaries(tmp_path / "first", 0)) as written:
        written.graph(graphs.clean(graph.as_graph_def(add_shapes=True), {layer.name for layer in layers_of(model)}))
    one = Server(tmp_path, free_ports(1)[0])
    try:
        browser.get(f"{one.url}/#graphs")
        shows(browser, "resnet50", "Tag")
        keep(browser, "graphs_resnet50")
        assert browser.execute_script("return 1 + 1") == 2
    finally:
        one.close()


def test_the_report_shows_curves_flags_and_cards_offline(logdir, browser, tmp_path):
    out = tmp_path / "report.html"
    assert code_of(report, [str(logdir / "first"), str(logdir / "second"), f"--out={out}"]) == 0
    text = out.read_text()
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    browser.get(out.as_uri())
    shown = shows(browser, "Results", "Curves", "Where the time went", "Differences of flags", "--learning_rate")
    for word in ("eval accuracy", "gradient_norm", "0.003", "0.001", "first, train", "complete"):
        assert word in shown
    keep(browser, "report")
    assert errors_of_ours(browser) == []


# ----------------------------------------------------------------------------------------------------------------------
# The parts.


def test_the_report_says_what_is_no_run(tmp_path, capsys):
    assert code_of(report, [str(tmp_path)]) == 2
    assert "holds no run.json; name the --run_dir of a run" in capsys.readouterr().err


def test_the_report_escapes_what_a_flag_holds(logdir, tmp_path):
    shutil.copytree(logdir / "first", tmp_path / "first")
    facts = json.loads((tmp_path / "first/run.json").read_text())
    facts["flags"]["dataset"] = "<script>alert(1)</script>"
    (tmp_path / "first/run.json").write_text(json.dumps(facts))
    assert code_of(report, [str(tmp_path / "first")]) == 0
    assert "<script>" not in (tmp_path / "first/report.html").read_text()


def test_norms_of_weights_and_of_the_last_update_are_those_of_the_checkpoints(run, tmp_path):
    from conftest import weights

    run(train_steps=6, log_every=1, checkpoint_every=1, keep_checkpoints=9, eval_every=0)
    lines = {line["step"]: line for line in metrics(tmp_path / "run") if line["split"] == "train"}

    def trainable(step):
        state = weights(tmp_path / "run", step)
        return [v for n, v in sorted(state.items()) if n.startswith("model/") and ("kernel" in n or "bias" in n)]

    for step in (2, 6):
        now, before = trainable(step), trainable(step - 1)
        norm = np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in now))
        moved = np.sqrt(sum(np.sum(np.square(a - b, dtype=np.float64)) for a, b in zip(now, before, strict=True)))
        assert lines[step]["parameter_norm"] == pytest.approx(norm, rel=1e-5)
        assert lines[step]["update_norm"] == pytest.approx(moved, rel=1e-3)


def test_a_histogram_counts_every_value_once():
    values = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    found = summaries._histogram(tf.constant(values)).numpy()
    assert found.shape == (summaries.HISTOGRAM_BUCKETS, 3)
    np.testing.assert_allclose(found[1:, 0], found[:-1, 1])
    assert found[:, 2].sum() == values.size
    assert (found[0, 0], found[-1, 1]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert summaries._histogram(tf.ones([5])).numpy()[:, 2].sum() == 5
    # Of a large tensor, evenly spaced ones: the shape of the distribution stays.
    large = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    found = summaries._histogram(tf.constant(large)).numpy()
    assert summaries.HISTOGRAM_VALUES <= found[:, 2].sum() < 2 * summaries.HISTOGRAM_VALUES
    mean = (found[:, 2] * (found[:, 0] + found[:, 1]) / 2).sum() / found[:, 2].sum()
    assert abs(mean) < 0.05


def test_a_pr_curve_agrees_with_scikit_learn():
    from sklearn.metrics import precision_score, recall_score

    chance = np.random.default_rng(1)
    labels, scores = chance.integers(0, 2, 200), chance.random(200)
    data = summaries.pr_curve(labels, scores)
    for i in (0, 10, 25, 40):
        said = scores >= np.linspace(0, 1, summaries.PR_THRESHOLDS)[i]
        assert data[4, i] == pytest.approx(precision_score(labels, said))
        assert data[5, i] == pytest.approx(recall_score(labels, said))


def test_pictures_are_drawn_for_edge_cases():
    assert pictures.matrix(np.zeros([2, 2], np.int64)).size[0] > 100
    flat = pictures.sheet(np.zeros([1, 8, 8, 3], np.float32), ["is 0, said 1"])
    assert isinstance(flat, PIL.Image.Image)
    assert pictures.scatter(np.ones([3, 1]), np.ones([3, 1])).size == (532, 532)
    for width in (1, 2, 5):
        assert pictures.plane(np.ones([3, width]), np.zeros(3, np.int64)).size == (608, 608)


def test_the_plane_of_features_is_that_of_their_two_main_directions():
    chance = np.random.default_rng(0)
    features = chance.normal(size=(200, 6)) * [0.1, 9.0, 0.1, 3.0, 0.1, 0.1]
    features[:, 1] = np.abs(features[:, 1]) * np.repeat([-1, 1], 100)
    image = np.asarray(pictures.plane(features, np.repeat([4, 7], 100))).astype(int)
    # Two classes: the hue of the first is 0, that of the second 1/2. They lie left and right along the first direction.
    red = np.argwhere((image[..., 0] > 100) & (image[..., 1] < 60))[:, 1]
    cyan = np.argwhere((image[..., 2] > 100) & (image[..., 0] < 80))[:, 1]
    assert len(red) > 500 and len(cyan) > 500
    assert red.max() < cyan.min() + 20


def test_a_profile_comes_on_demand_from_a_running_process(trainer, tmp_path):
    flags = ("--model=mlp", "--train_steps=1000000", "--checkpoint_every=200", "--log_every=500")
    one = trainer(*flags, f"--run_dir={tmp_path}")
    while not any((tmp_path / "checkpoints").glob("step-*")):
        assert one.process.poll() is None, one.wait()
        time.sleep(0.05)
    one.process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("train/plugins/profile/*/*.xplane.pb")):
        assert one.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    one.process.send_signal(signal.SIGTERM)
    code, output = one.wait()
    assert code == 143, output
    assert f"profile of {profiles.STEPS_ON_DEMAND} steps" in output
    assert "MatMul" in output


def test_the_step_is_shown_for_every_kind_of_loop(run, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        summaries.Summaries, "tagged_graph", lambda self, tag, graph: shown.setdefault(tag, []).append(graph)
    )
    for name, flags in {
        "one": {"replicas": 1, "strategy": "one_device"},
        "parts": {"accumulate": 2, "replicas": 2, "ema": 0.9},
        "sam": {"optimizer": "sam", "replicas": 2},
        "jit": {"jit": "on", "replicas": 2},
    }.items():
        run(name, train_steps=2, **flags)
    assert len(shown["step of all replicas"]) == 4
    for graph in shown["step of one replica"]:
        names = [node.name for node in graph.node]
        assert len(names) == len(set(names))
        assert any(name.startswith("all_reduce/") for name in names)
        assert any(name.startswith("optimizer/") for name in names)
    assert all(function.signature.name for function in shown["step of all replicas"][3].library.function)


def test_layers_that_are_opened_twice_get_their_own_names():
    assert graphs._own_name("net_1/block_1_1/conv_1", {"net", "block_1", "conv"}) == "net/block_1/conv"


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps.


def test_a_sweep_runs_every_combination_ranks_them_and_continues(tmp_path, data_dir):
    words = [sys.executable, str(ROOT / "trainers/sweep.py"), "--model=mlp", "--learning_rate=1e-3,1e-5", "--jobs=2"]
    words += ["--train_steps=60", f"--data_dir={data_dir}", f"--sweep_dir={tmp_path}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert {one["run"] for one in ranking} == {"learning_rate=1e-3", "learning_rate=1e-5"}
    best, worst = (line for line in (tmp_path / "ranking.md").read_text().splitlines()[2:])
    assert "0.001" in best and "1e-05" in worst
    for name in ("learning_rate=1e-3", "learning_rate=1e-5"):
        assert (tmp_path / name / "train").is_dir()
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count("complete already") == 2


def test_a_sweep_reads_a_file_and_draws_at_random(tmp_path):
    spec = tmp_path / "sweep.json"
    spec.write_text('{"learning_rate": [0.001, 0.003, 0.01], "model": "mlp", "deterministic": [true, false]}')
    values = sweep.values_of(["--ema=0.9"], spec)
    assert values["deterministic"] == ["true", "false"]
    grid = sweep.combinations(values, 0, 0)
    assert len(grid) == 6 and all(one["ema"] == "0.9" for one in grid)
    drawn = sweep.combinations(values, 4, 1)
    assert len(drawn) == 4 and drawn == sweep.combinations(values, 4, 1)
    assert len({sweep.name_of(one, ["learning_rate", "deterministic"]) for one in drawn}) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nothing=1,2"], "--nothing is not a flag of"),
        (["--learning_rate=1,,2"], "has an empty value"),
        (["--run_dir=here"], "--run_dir is set for each run"),
        (["word"], "'word' is not a flag"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_run(flags, said):
    with pytest.raises(BadConfiguration, match=said):
        sweep.values_of(flags, None)


def test_a_sweep_answers_a_wrong_value_before_it_runs_anything(tmp_path, capsys):
    code = code_of(sweep, ["--model=mlp,nothing", f"--sweep_dir={tmp_path / 'sweep'}"])
    assert code == 2 and not (tmp_path / "sweep").exists()
    assert "'nothing' is not known" in capsys.readouterr().err
