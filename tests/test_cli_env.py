"""`outspoken env`, the accelerate configs that come with the package, and starting a training command on several processes."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from outspoken.cli import launch, main
from outspoken.cli.common import CommandError
from outspoken.cli.env import accelerate_config, accelerate_configs


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.delenv("OUTSPOKEN_DEBUG", raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class TestEnv:
    def test_for_programs(self, cli):
        code, out, _ = cli("env", "--json")
        found = json.loads(out)
        assert code == 0
        assert found["packages"]["torch"] == version("torch") and found["packages"]["trl"] == version("trl")
        assert "vllm" in found["packages"] and "flash-attn" in found["packages"]
        assert found["python"] == ".".join(map(str, sys.version_info[:3]))
        assert all(Path(path).is_file() for path in found["accelerate_configs"].values())

    def test_for_people(self, cli):
        code, out, _ = cli("env")
        assert code == 0
        lines = [line.split() for line in out.splitlines()]
        assert ["torch", version("torch")] in lines
        for name, path in accelerate_configs().items():
            assert [name, str(path)] in lines


class TestConfigs:
    def test_all_are_there(self):
        assert set(accelerate_configs()) == {
            "single_gpu", "multi_gpu", "ddp_cpu", "fsdp1", "fsdp2", "zero1", "zero2", "zero3",
        }  # fmt: skip

    @pytest.mark.parametrize(
        "name, kind, key, value",
        [
            ("single_gpu", DistributedType.NO, "num_processes", 1),
            ("multi_gpu", DistributedType.MULTI_GPU, "use_cpu", False),
            ("ddp_cpu", DistributedType.MULTI_GPU, "use_cpu", True),
            ("fsdp1", DistributedType.FSDP, "fsdp_version", 1),
            ("fsdp2", DistributedType.FSDP, "fsdp_version", 2),
            ("zero1", DistributedType.DEEPSPEED, "zero_stage", 1),
            ("zero2", DistributedType.DEEPSPEED, "zero_stage", 2),
            ("zero3", DistributedType.DEEPSPEED, "zero_stage", 3),
        ],
    )
    def test_accelerate_reads_them(self, name, kind, key, value):
        config = load_config_from_file(str(accelerate_config(name)))
        assert config.distributed_type == kind
        settings = {**vars(config), **config.fsdp_config, **config.deepspeed_config}
        assert settings[key] == value

    def test_accelerate_knows_every_option_of_fsdp_and_deepspeed(self):
        """It reads a misspelt one without a word, and ignores it."""
        from accelerate.commands.launch import launch_command_parser

        known = {action.dest for action in launch_command_parser()._actions}
        for name, path in accelerate_configs().items():
            config = load_config_from_file(str(path))
            assert {*config.fsdp_config, *config.deepspeed_config} <= known, name

    def test_a_file_of_ones_own(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(accelerate_config("ddp_cpu").read_text())
        assert accelerate_config(str(file)) == file

    def test_neither_name_nor_file(self):
        with pytest.raises(CommandError, match="accelerate_config 'zero4' is no file, nor one of ddp_cpu, fsdp1,"):
            accelerate_config("zero4")

    def test_they_are_in_the_package(self):
        import tomllib

        import outspoken

        project = Path(outspoken.__file__).parent / "pyproject.toml"
        data = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]
        assert "accelerate_configs/*.yaml" in data["outspoken.cli"]


@pytest.fixture
def gpus(monkeypatch):
    def have(count):
        import torch

        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return have


class TestHowMany:
    @pytest.mark.parametrize(
        "count, name, processes, expected",
        [
            (4, "zero2", None, ("zero2", 4)),  # as many as there are GPUs, whatever the file says
            (4, "multi_gpu", 2, ("multi_gpu", 2)),
            (4, None, 3, ("multi_gpu", 3)),
            (4, None, 1, ("single_gpu", 1)),
            (0, None, 3, ("ddp_cpu", 3)),
            (0, "ddp_cpu", None, ("ddp_cpu", 2)),
            (0, "single_gpu", None, ("single_gpu", 1)),
        ],
    )
    def test_settled(self, gpus, count, name, processes, expected):
        gpus(count)
        file, found = launch.settle(name, processes)
        assert (file.stem, found) == expected

    @pytest.mark.parametrize(
        "count, name, processes, sentence",
        [
            (0, "fsdp2", None, "this machine has none; take ddp_cpu"),
            (2, "multi_gpu", 4, "one process a GPU, 4 in all, and this machine has 2; lower num_processes"),
            (2, None, 0, "num_processes is 0; start at least one"),
            (2, "no_such_config", None, "is no file, nor one of"),
        ],
    )
    def test_impossible(self, gpus, count, name, processes, sentence):
        gpus(count)
        with pytest.raises(CommandError, match=sentence):
            launch.settle(name, processes)

    def test_a_file_that_is_no_config(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("distributed_type: SOMETHING\n")
        with pytest.raises(CommandError, match="cannot be read"):
            launch.settle(str(file), None)


class TestLaunch:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What would have been started; the first process then says 1, and the launcher 0."""
        made = []

        def call(command, env):
            made.append((command, env))
            Path(env[launch.LAUNCHED]).write_text("1")
            return 0

        monkeypatch.setattr(subprocess, "call", call)
        return made

    @pytest.mark.parametrize("from_yaml", [False, True])
    def test_starts_the_command_anew_through_accelerate(self, cli, calls, tmp_path, from_yaml):
        config = tmp_path / "run.yaml"
        config.write_text("learning_rate: 1e-3\n" + ("accelerate_config: ddp_cpu\n" if from_yaml else ""))
        options = [] if from_yaml else ["--accelerate_config", "ddp_cpu"]
        code, *_ = cli("sft", "--config", config, *options, "--max_steps", 3, "--json")
        ((command, env),) = calls
        assert code == 1
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        ours = command[command.index("--module") :]
        assert ours == [
            "--module", "outspoken.cli.launch", "sft", "--config", str(config), *options, "--max_steps", "3", "--json",
        ]  # fmt: skip
        assert command[command.index("--num_processes") + 1] == "2"
        assert env["ACCELERATE_USE_CPU"] == "true"

    def test_the_processes_started_do_not_start_more(self, calls, monkeypatch, tmp_path):
        code_file = tmp_path / "code"
        monkeypatch.setenv(launch.LAUNCHED, str(code_file))
        assert launch.launch("sft", None, ["--accelerate_config", "ddp_cpu"], False) is None
        assert not calls
        assert launch.told(1) == 0 and code_file.read_text() == "1"

    def test_nothing_is_started_where_nothing_is_asked_for(self, calls):
        assert launch.launch("sft", None, ["--max_steps", "3"], False) is None
        assert launch.told(1) == 1 and not calls

    def test_wrong_settings(self, cli, calls):
        code, _, err = cli("sft", "--accelerate_config", "zero4")
        assert code == 2 and "accelerate_config 'zero4' is no file" in err
        code, _, err = cli("sft", "--num_processes", "many")
        assert code == 2 and "num_processes must be a whole number" in err
        assert not calls


@pytest.mark.slow
class TestReally:
    def run(self, *arguments):
        command = [sys.executable, "-m", "outspoken.cli.main", "sft", "--accelerate_config", "ddp_cpu", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    def test_two_processes_train_and_one_answers(self, tiny_model_dir, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"text": f"The sky is blue {i}."}) + "\n" for i in range(16)))
        done = self.run(
            "--model_name_or_path", tiny_model_dir, "--dataset_path", str(data), "--output_dir", str(tmp_path / "out"),
            "--max_steps", "3", "--per_device_train_batch_size", "2", "--report_to", "none", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout)
        assert result["steps"] == 3 and result["status"] == "finished"
        record = json.loads((tmp_path / "out" / "outspoken" / "run.json").read_text())
        assert record["world_size"] == 2 and record["config"]["max_steps"] == 3

    def test_a_wrong_dataset_is_told_and_its_exit_code_comes_through(self, tiny_model_dir, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text('{"question": "no text"}\n')
        done = self.run(
            "--model_name_or_path", tiny_model_dir, "--dataset_path", str(data), "--output_dir", str(tmp_path / "out")
        )
        assert done.returncode == 2
        assert "'question'" in done.stderr and "outspoken: " in done.stderr
