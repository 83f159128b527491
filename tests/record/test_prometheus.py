"""`--metrics_port`: what a real Prometheus reads of a real run, and that nothing of it can end one."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
from conftest import ROOT

from launch.workers import free_ports
from trainers.record import prometheus, reading
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import metrics_address, resolve

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed (requirements/metrics.txt)")
DASHBOARD = ROOT / "k8s/components/metrics/dashboard.json"
RUN = ("--model=mlp", "--batch_size=32", "--checkpoint_every=200", "--eval_every=200", "--log_every=100")
SMI = "0, 97, 70012, 1100, 91, 699.5, 0x0000000000000024, 2"


def page(port, path="/metrics", **query):
    words = urllib.parse.urlencode(query)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?{words}", timeout=10) as answer:
        return answer.read().decode()


def until(condition, process, seconds=240):
    """Waits for a condition that may fail by an error of the network."""
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        try:
            if found := condition():
                return found
        except OSError:
            pass
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9400", ("127.0.0.1", 9400)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("node7.lan:80", ("node7.lan", 80)),
    ],
)
def test_a_port_is_of_loopback_unless_a_host_is_named(text, address):
    assert metrics_address(text) == address


@pytest.mark.parametrize("text", ["0", "65536", ":9400", "host:", "a b", "::1:80", "-1", "９４００", "[::1]"])
def test_what_is_no_port_is_one_line(text):
    with pytest.raises(BadConfiguration, match="--metrics_port .* is not PORT or HOST:PORT"):
        metrics_address(text)


def test_an_evaluator_has_no_port_of_its_own(tmp_path):
    with pytest.raises(BadConfiguration, match="the trainer answers; leave it out"):
        resolve(Config(model="mlp", mode="evaluate", run_dir=str(tmp_path), metrics_port="9400"))


def test_without_the_library_one_line_says_how_to_install_it(monkeypatch):
    prometheus.check("9400")
    monkeypatch.setattr(prometheus.importlib.util, "find_spec", lambda name: None)
    prometheus.check("")
    with pytest.raises(BadConfiguration, match="requirements/metrics.txt"):
        prometheus.check("9400")


def test_a_port_that_is_taken_ends_no_run(trainer, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one = trainer(*RUN, "--train_steps=200", f"--run_dir={tmp_path / 'run'}", f"--metrics_port={port}")
        code, output = one.wait()
    assert code == 0 and f"--metrics_port {port} is not served: " in output, output
    assert "the run goes on without" in output


def queries():
    """Every query of the dashboard, for all runs."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "instance"] and len(found) > 20
    return [expression.replace("$instance", ".*") for expression in found]


def test_every_query_of_the_dashboard_is_of_numbers_that_are_told():
    text = (ROOT / "trainers/record/prometheus.py").read_text()
    for expression in queries():
        for name in re.findall(r"lockstep_(\w+)", expression):
            assert f'"{name}"' in text, name


@pytest.fixture
def real_prometheus(tmp_path):
    """`real_prometheus(port)` starts a Prometheus that reads of that port: its process and its own port."""
    program, started = shutil.which("prometheus"), []
    if program is None:
        pytest.skip("no prometheus is on the PATH")

    def start(port):
        own = free_ports(1)[0]
        (tmp_path / "prometheus.yml").write_text(
            "scrape_configs:\n- job_name: lockstep\n  scrape_interval: 1s\n  static_configs:\n"
            f"  - targets: ['127.0.0.1:{port}']\n"
        )
        words = [program, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with open(tmp_path / "prometheus.log", "w") as log:
            words += [f"--web.listen-address=127.0.0.1:{own}"]
            started.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
        return started[-1], own

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_real_prometheus_answers_every_query_of_the_dashboard(real_prometheus, trainer, plant, tmp_path):
    """Of a run of two workers, on a machine whose nvidia-smi tells of a GPU."""
    plant("nvidia-smi", f"case \"$*\" in *utilization*) echo '{SMI}' ;; *) exit 1 ;; esac")
    port, *ports = free_ports(3)
    flags = ("--strategy=multi_worker", *RUN, "--train_steps=1000000", f"--run_dir={tmp_path / 'run'}")
    addresses = [f"127.0.0.1:{number}" for number in ports]
    members = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        members.append(trainer(*flags, f"--metrics_port={port}", env={"TF_CONFIG": json.dumps(config)}))
    chief = members[0].process
    until(lambda: re.search(r'lockstep_worker_step_seconds\{[^}]*worker="1"', page(port)), chief)
    text = page(port)
    assert 'lockstep_metric{name="accuracy",split="eval"} 0.' in text and "lockstep_gpu_throttled{" in text
    process, own = real_prometheus(port)

    def answered(expression):
        return json.loads(page(own, "/api/v1/query", query=expression))["data"]["result"]

    until(lambda: answered("lockstep_step > 0"), process)
    for expression in queries():
        result = until(lambda asked=expression: answered(asked), process, 30)
        assert all(float(one["value"][1]) == float(one["value"][1]) for one in result), expression
    whole = answered("sum by (instance) (lockstep_goodput_seconds) / on (instance) lockstep_wall_seconds")
    assert float(whole[0]["value"][1]) == pytest.approx(1, rel=0.01)
    chief.terminate()
    assert [one.wait()[0] for one in members] == [143, 143]
    assert reading.read_run(tmp_path / "run")["exit_code"] == 143


def test_the_port_of_the_manifests_is_that_of_the_launcher():
    from launch.kube.submission import METRICS_ADDRESS

    folder = ROOT / "k8s/components/metrics"
    assert f"--metrics_port={METRICS_ADDRESS}" in (folder / "kustomization.yaml").read_text()
    port = METRICS_ADDRESS.partition(":")[2]
    assert f"containerPort: {port}" in (folder / "kustomization.yaml").read_text()
    assert f"port: {port}" in (folder / "network.yaml").read_text()
