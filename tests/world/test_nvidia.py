"""A trainer whose TensorFlow sees none of the machine's GPUs says so; and how a data sheet is found by a name."""

import faults
import pytest

from trainers.world import data_sheets, nvidia, programs


@pytest.fixture
def nowhere(tmp_path):
    """The folder of a driver that is not loaded."""
    return tmp_path / "driver"


def test_gpus_of_nvidia_smi_that_tensorflow_does_not_see_are_told(plant, nowhere):
    plant("nvidia-smi", faults.smi([faults.H100, faults.H100]))
    line = nvidia.unseen({}, nowhere)
    assert "TensorFlow sees no GPU, but the NVIDIA driver has 2 (NVIDIA H100 80GB HBM3)" in line
    assert "launch/doctor.py" in line and "\n" not in line
    assert "with CUDA_VISIBLE_DEVICES=7" in nvidia.unseen({"CUDA_VISIBLE_DEVICES": "7"}, nowhere)


def test_gpus_of_the_kernel_are_told_without_nvidia_smi(plant, nowhere):
    faults.kernel(nowhere, "550.54.14", ["NVIDIA L4", "NVIDIA L4"])
    assert "has 2 (NVIDIA L4)" in nvidia.unseen({}, nowhere)
    plant("nvidia-smi", faults.failing(faults.MISMATCH, 18))
    assert "has 2 (NVIDIA L4)" in nvidia.unseen({}, nowhere)


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose_are_not_told(plant, nowhere, value):
    plant("nvidia-smi", faults.smi([faults.H100]))
    assert nvidia.unseen({"CUDA_VISIBLE_DEVICES": value}, nowhere) == ""


def test_a_machine_without_gpus_is_told_nothing(plant, nowhere, monkeypatch):
    assert nvidia.unseen({}, nowhere) == ""
    plant("nvidia-smi", faults.failing(faults.NO_DRIVER, 9))
    assert nvidia.unseen({}, nowhere) == ""
    monkeypatch.setattr(programs, "SECONDS", 0.2)
    plant("nvidia-smi", "sleep 60")
    assert nvidia.unseen({}, nowhere) == ""


def test_what_a_gpu_is_at_is_read_and_why_it_is_held_back(plant):
    """The rows of an H200 with driver 580, and of a card that tells little."""
    rows = "0, 0, 0, 345, 38, 77.85, 0x0000000000000001, 0\n3, 98, 70012, 1100, 91, 699.5, 0x0000000000000024, 2\n"
    plant("nvidia-smi", f"printf '{rows}4, [N/A], 12, [N/A], 40, [N/A], [N/A], [N/A]\\n'")
    idle, hot, old = nvidia.readings({"CUDA_VISIBLE_DEVICES": "0, 3,4"})
    assert idle == {
        "gpu": 0, "utilization": 0, "memory_mib": 0, "clock_mhz": 345, "temperature": 38, "watts": 77.85,
        "throttled": [], "ecc_errors": 0,
    }  # fmt: skip
    assert hot["throttled"] == ["power cap", "software thermal slowdown"] and hot["ecc_errors"] == 2
    assert old["utilization"] is None and old["throttled"] == []
    plant("nvidia-smi", faults.failing(faults.NO_DRIVER, 9))
    assert nvidia.readings({}) == []


def test_a_trainer_that_sees_no_gpu_of_the_machine_says_so_once_and_names_the_doctor(plant, trainer):
    plant("nvidia-smi", faults.smi([faults.H100, faults.H100]))
    code, output = trainer("--model=mlp", "--dry_run").wait()
    assert code == 0
    assert output.count("warning: TensorFlow sees no GPU, but the NVIDIA driver has 2") == 1, output
    assert "python launch/doctor.py says why" in output


def test_a_program_that_does_not_end_is_ended_with_all_that_it_has_started(plant, tmp_path):
    path = plant("slow", f"sleep 60 & echo $! > {tmp_path}/child; echo begun; wait")
    answer = programs.ask([path], 0.5)
    assert answer.code is None and answer.output == "begun\n" and "no answer within 0.5 s" in answer.said
    assert faults.has_ended((tmp_path / "child").read_text().strip())
    assert programs.ask([tmp_path / "none"]).error == "No such file or directory"


@pytest.mark.parametrize(
    "name, precision, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("Tesla T4", "float16", 65),
        ("NVIDIA L40S", "float32", 183),
        ("NVIDIA GH200 480GB", "bfloat16", 989),
        ("NVIDIA GeForce RTX 4090", "float32", 82.6),
        ("NVIDIA RTX A1000", "float32", None),
        ("NVIDIA T400", "float32", None),
        ("NVIDIA A10G", "float32", None),
    ],
)
def test_a_data_sheet_is_that_of_the_card_and_not_of_one_whose_name_begins_alike(name, precision, peak):
    assert data_sheets.peak_teraflops(name, precision) == peak
