"""What starts clusters: the launcher's file against Ray's own loading, a real AWS server of moto and its scheduler;
KubeRay's manifests against its CRDs; the packages that jobs take along."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
PINNED = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]]
KUBERNETES = ROOT / "jobs" / "kubernetes"
FILES = [ROOT / "cluster.yaml", ROOT / "jobs" / "runtime_env.yaml", *sorted(KUBERNETES.glob("*.yaml"))]
CRDS = os.environ.get("BERTRAY_KUBERAY_CRDS", "")


def named(requirement):
    """A requirement's name with its extras, as pip compares names."""
    return re.match(r"[\w.\-]+(\[[\w,]+\])?", requirement)[0].lower().replace("_", "-")


def version(requirement):
    """What constraints.txt pins it to."""
    pinned = {name.lower().replace("_", "-"): number for name, number in PINNED.items()}
    return pinned[named(requirement).partition("[")[0]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_there_are_no_keys_and_no_versions_but_the_pinned(file):
    text = file.read_text()
    assert not re.search(r"AKIA|ASIA|BEGIN [A-Z ]*PRIVATE|secret_access_key|hf_\w{20}", text, re.I)
    for name, number in re.findall(r"([\w.\-]+)(?:\[[\w,]+\])?==([\w.]+)", text):
        assert number == version(name), name
    for number in re.findall(r"rayproject/ray:([\d.]+)|rayVersion: (\S+)", text):
        assert "".join(number) == PINNED["ray"]


# --- cluster.yaml -----------------------------------------------------------------------------------------

# What `ray up` does before it reaches a machine by ssh, then a node of each type by Ray's own provider.
UP = """
import json, sys, yaml, boto3
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
iam, ec2 = boto3.client("iam"), boto3.client("ec2")
for name in ("bertray-head", "bertray-worker"):
    iam.create_instance_profile(InstanceProfileName=name)
config = _bootstrap_config(yaml.safe_load(open("cluster.yaml")), no_config_cache=True)
provider = _get_node_provider(config["provider"], config["cluster_name"])
nodes = {}
for name, kind in config["available_node_types"].items():
    (node,) = provider.create_node(kind["node_config"], {"ray-node-name": name}, 1)
    nodes[name] = ec2.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]
groups = ec2.describe_security_groups(GroupNames=["bertray"])["SecurityGroups"]
json.dump({"config": config, "nodes": nodes, "groups": groups}, open(sys.argv[1], "w"), default=str)
"""


@pytest.fixture(scope="module")
def up(s3, tmp_path_factory):
    """What Ray made of the launcher's file: the config it filled in, and the machines and groups that AWS (moto) gave
    it. Its key goes into a home folder of its own."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", UP, str(home / "up.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((home / "up.json").read_text())


def test_aws_gives_what_the_launchers_file_asks_for(up):
    kinds, nodes = up["config"]["available_node_types"], up["nodes"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["cpu_spot"]["resources"]["CPU"] == 16 and "GPU" not in kinds["cpu_spot"]["resources"]
    for name in ("gpu_spot", "gpu_on_demand"):
        assert kinds[name]["resources"]["GPU"] == 1 and "accelerator_type:L4" in kinds[name]["resources"]
    spot = {name for name, node in nodes.items() if node.get("InstanceLifecycle") == "spot"}
    assert spot == {"gpu_spot", "cpu_spot"}
    for name, node in nodes.items():
        role = "bertray-head" if name == "head" else "bertray-worker"
        assert node["IamInstanceProfile"]["Arn"].endswith(f"/{role}")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert {group["GroupName"] for group in node["SecurityGroups"]} == {"bertray"}


def test_from_outside_there_is_ssh_alone(up):
    (group,) = up["groups"]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    inside = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert inside == [group["GroupId"]]
    (start,) = (line for line in CLUSTER["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start


def scheduled(config, demand, failed=()):
    """How many nodes of which type Ray's autoscaler would start for a demand, where some types were refused."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    read = AutoscalingConfig(config, skip_content_hash=True)
    refused = dict.fromkeys(failed, 0.0)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={
            name: kind for name, kind in read.get_node_type_configs().items() if name != config["head_node_type"]
        },
        max_num_nodes=read.get_max_num_worker_nodes(),
        idle_timeout_s=read.get_idle_timeout_s(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(one) for one in demand]),
        cloud_resource_availabilities=refused,
        recoverable_resource_availabilities=refused,
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}


def test_spot_comes_first_and_on_demand_where_there_is_none(up):
    config = up["config"]
    encoders = [{"GPU": 1, "CPU": 3.6}] * 3
    assert scheduled(config, []) == {"gpu_spot": 1}  # what is always there
    assert scheduled(config, encoders) == {"gpu_spot": 3}
    assert scheduled(config, encoders, failed=["gpu_spot"]) == {"gpu_spot": 1, "gpu_on_demand": 2}
    assert scheduled(config, encoders * 4) == {"gpu_spot": 8, "gpu_on_demand": 2}
    assert scheduled(config, [{"CPU": 3.6}] * 12) == {"gpu_spot": 1, "cpu_spot": 3}


def lines():
    return [line for name, given in CLUSTER.items() if name.endswith("_commands") for line in given]


def test_every_line_is_shell():
    assert len(lines()) > 10
    for line in lines():
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and not done.stderr, f"{line}: {done.stderr}"


def test_set_up_installs_what_bertray_needs_in_the_tested_versions(tmp_path):
    """The lines that install, run in a home folder like a node's: pip may fetch nothing, so each line has to ask for
    the very versions that these tests run with."""
    for remote, local in CLUSTER["file_mounts"].items():
        if "auth_token" not in remote:
            place = tmp_path / remote.removeprefix("~/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text((ROOT / local).read_text())
    (tmp_path / "venv").symlink_to(Path(sys.executable).parents[1])
    environment = os.environ | {"HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1", "PIP_CONSTRAINT": ""}
    ran = [line for line in CLUSTER["setup_commands"] if "~/setup" in line]
    for line in ran:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "Would install" not in done.stdout, f"{line}: {done.stdout}{done.stderr}"
    assert len(ran) == 3
    written = (tmp_path / "setup" / "requirements.txt").read_text().split()
    assert written == [*"\n".join(NEEDED).split(), "ray[default]", "boto3"]


# --- what jobs take along ---------------------------------------------------------------------------------


def runtime_env():
    return yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())


def test_a_jobs_packages_are_what_bertray_needs_as_pinned():
    constraint, *packages = runtime_env()["pip"]["packages"]
    assert constraint.endswith("/constraints.txt")
    assert packages == [f"{named(needed)}=={version(needed)}" for needed in NEEDED]


def test_ray_reads_a_jobs_packages_and_makes_them_anew_when_a_version_changes():
    from ray.runtime_env import RuntimeEnv

    given = runtime_env()
    read = RuntimeEnv(**given)
    assert read.pip_config()["packages"] == given["pip"]["packages"]
    before = read.pip_uri()
    given["pip"]["packages"][2] = "torch==2.12.0"
    assert RuntimeEnv(**given).pip_uri() != before


def test_pip_takes_a_jobs_packages(tmp_path):
    """Ray's own file for pip, which may fetch nothing: each line has to be satisfied by what these tests run with."""
    from ray._private.runtime_env.dependency_utils import gen_requirements_txt

    gen_requirements_txt(str(tmp_path / "requirements.txt"), runtime_env()["pip"]["packages"])
    environment = os.environ | {"RAY_RUNTIME_ENV_CREATE_WORKING_DIR": str(ROOT), "PIP_CONSTRAINT": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "-r", str(tmp_path / "requirements.txt")],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stdout + done.stderr


def test_code_that_a_job_brings_along_knows_its_version(monkeypatch):
    """Where bertray is in the working directory and not installed."""
    from importlib import metadata

    import bertray
    from bertray.embed import versions

    installed = metadata.distribution

    def others(name):
        if name == "bertray":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", others)
    assert versions()["bertray"] == bertray.__version__ == PROJECT["version"]


# --- Kubernetes -------------------------------------------------------------------------------------------


def manifest(name):
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())


def cluster_of(name):
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def service():
    """The config of Ray Serve that the RayService holds."""
    return yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])


def environments():
    (application,) = service()["applications"]
    return [yaml.safe_load(manifest("rayjob")["spec"]["runtimeEnvYAML"]), application["runtime_env"]]


def test_pods_install_what_a_job_takes_along():
    from ray.runtime_env import RuntimeEnv

    for given in environments():
        assert given.pop("working_dir") == "s3://BUCKET/bertray.zip"
        assert RuntimeEnv(**given).to_dict() == RuntimeEnv(**runtime_env()).to_dict()


def test_the_jobs_command_is_one_of_this_folder():
    from bertray.cli import _parser

    python, script, *arguments = manifest("rayjob")["spec"]["entrypoint"].split()
    assert python == "python" and (ROOT / script).is_file() and script == "jobs/pipeline.py"
    options = _parser().parse_args(["run", *arguments])
    assert (ROOT / options.spec).is_file() and options.set == ["ray.device=cuda"]


def test_the_services_config_is_one_of_ray_serve():
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    from bertray.serve import build

    (application,) = ServeDeploySchema.model_validate(service()).applications
    assert import_attr(application.import_path) is build
    encoders, gate = application.deployments  # both: Ray Serve gives its runtime_env to those that are named
    assert (encoders.name, gate.name) == ("Encoders", "Gate")
    (local,) = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())["applications"]
    assert {*local["args"]} <= {*application.args}
    assert gate.user_config["heads"] == application.args["heads"]
    (gpu,) = cluster_of("rayservice")["workerGroupSpecs"]
    assert gpu["minReplicas"] == application.args["replicas"]
    assert application.args["num_cpus"] + 0.5 <= float(limits(gpu)["cpu"])  # beside the gate


def limits(group):
    (container,) = group["template"]["spec"]["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    return resources["limits"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_pods_have_an_account_limits_and_nothing_of_their_host(name):
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == manifest("account")["metadata"]["name"]
        assert {*limits(group)} >= {"cpu", "memory", "ephemeral-storage"}
        assert not re.search("hostPath|hostNetwork|privileged|AWS_", json.dumps(pod))
        (container,) = pod["containers"]
        assert container["securityContext"]["runAsNonRoot"]
    gpus = {group["groupName"]: limits(group).get("nvidia.com/gpu") for group in cluster["workerGroupSpecs"]}
    assert gpus.pop("gpu") == 1 and not any(gpus.values())
    assert all(group["minReplicas"] <= group["maxReplicas"] for group in cluster["workerGroupSpecs"])


# --- KubeRay's own schemas --------------------------------------------------------------------------------

KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def faults(value, schema, place):
    """Where a value is not what a structural schema of Kubernetes says; keys that it does not know are faults."""
    either = schema.get("x-kubernetes-int-or-string")
    kind = (int, str) if either else KINDS.get(schema.get("type"), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and kind is not object):
        yield f"{place} is {value!r}, and not of type {schema.get('type')}"
    elif value not in schema.get("enum", [value]):
        yield f"{place} is {value!r}, and none of {schema['enum']}"
    elif isinstance(value, dict):
        yield from (f"{place} lacks {key}" for key in schema.get("required", ()) if key not in value)
        others = schema.get("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
        for key, part in value.items():
            known = schema.get("properties", {}).get(key, others)
            if isinstance(known, dict):
                yield from faults(part, known, f"{place}.{key}")
            elif not known:
                yield f"{place} knows no {key}"
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from faults(part, schema["items"], f"{place}[{number}]")


def spec_schema(name):
    if not CRDS:
        pytest.skip("BERTRAY_KUBERAY_CRDS names no folder with KubeRay's CRDs (see CONTRIBUTING.md)")
    (file,) = Path(CRDS).glob(f"*{name}s.yaml")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]  # a megabyte
    (first,) = (one for one in versions if one["name"] == "v1")
    return first["schema"]["openAPIV3Schema"]["properties"]["spec"]


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_kuberay_takes_the_manifest(name):
    given = manifest(name)
    assert (given["apiVersion"], given["kind"].lower()) == ("ray.io/v1", name)
    assert list(faults(given["spec"], spec_schema(name), "spec")) == []


def test_what_kuberay_does_not_know_is_found():
    """That the test above can fail."""
    schema, spec = spec_schema("rayjob"), manifest("rayjob")["spec"]
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    group["maxReplica"] = group.pop("maxReplicas")
    group["minReplicas"] = "1"
    group["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    spec["rayClusterSpec"]["authOptions"]["mode"] = "password"
    found = "\n".join(faults(spec, schema, "spec"))
    place = "spec.rayClusterSpec.workerGroupSpecs[0]"
    for fault in (
        f"{place} lacks maxReplicas",
        f"{place} knows no maxReplica",
        f"{place}.minReplicas is '1', and not of type integer",
        f"{place}.template.spec.containers[0].resources knows no limit",
        "spec.rayClusterSpec.authOptions.mode is 'password', and none of",
    ):
        assert fault in found
    assert found.count("\n") == 4
