"""launch/kubernetes/*.yaml: against their published schemas, offline; and their commands, as pods would run them."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from cluster import Hosts, can_make_hosts, end
from launching import ROOT
from resuming import RECIPE, Run

FOLDER = ROOT / "launch/kubernetes"
KUBEFLOW = "kubeflow/training/models"
POD = "https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.core.v1.PodTemplateSpec"
KINDS = {"int": "integer", "str": "string", "bool": "boolean"}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def pod_of(document: dict) -> dict:
    spec = document["spec"]
    return (spec["pytorchReplicaSpecs"]["Worker"] if "pytorchReplicaSpecs" in spec else spec)["template"]["spec"]


def environment(container: dict) -> dict:
    return {entry["name"]: entry.get("value") for entry in container["env"]}


@pytest.mark.parametrize("name", ["job", "pytorchjob"])
def test_both_say_the_same_of_the_training(name):
    pod = pod_of(documents(name)[-1])
    (container,) = pod["containers"]
    (other,) = pod_of(documents("pytorchjob" if name == "job" else "job")[-1])["containers"]
    assert container["args"] == other["args"] and container["image"] == other["image"]
    assert container["args"][1:3] == ["--run-name", "$(RUN)"], "the run has the job's name, so that it is resumed"
    assert "RUN" in environment(container)
    patience = int(environment(container)["PET_SHUTDOWN_TIMEOUT"])
    assert patience < pod["terminationGracePeriodSeconds"], "torchrun must be done before the pod is killed"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_numbers_of_pods_and_gpus_agree():
    service, job = documents("job")
    spec, (container,) = job["spec"], pod_of(job)["containers"]
    given = environment(container)
    assert spec["parallelism"] == spec["completions"] == int(given["NUM_PODS"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["NUM_GPUS"])
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == name == pod_of(job)["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    (pytorch,) = documents("pytorchjob")
    elastic, worker = pytorch["spec"]["elasticPolicy"], pytorch["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    (container,) = pod_of(pytorch)["containers"]
    assert container["name"] == "pytorch", "the operator finds the container by it"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == elastic["nProcPerNode"]


@pytest.fixture(scope="module")
def wheels():
    """The folder into which `.ci/run` downloads the packages with the schemas."""
    folder = os.environ.get("NNDIST_SCHEMA_WHEELS")
    if folder is None:
        pytest.skip("the packages with Kubernetes' schemas are not in $NNDIST_SCHEMA_WHEELS")
    return Path(folder)


@pytest.fixture(scope="module")
def validator(wheels):
    """Returns a validator of a schema that knows Kubernetes' definitions and rejects unknown names."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    (wheel,) = wheels.glob("kubernetes_validate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        newest = max(
            (name for name in archive.namelist() if name.endswith("-local-strict/_definitions.json")),
            key=lambda name: [int(part) for part in name.split("/v")[1].split("-")[0].split(".")],
        )
        definitions = json.loads(archive.read(newest))
        jobs = {
            kind: json.loads(archive.read(newest.replace("_definitions", file)))
            for kind, file in (("Job", "job-batch-v1"), ("Service", "service-v1"))
        }
    registry = Registry().with_resource(
        "https://kubernetes.io/api/_definitions.json", DRAFT202012.create_resource(definitions)
    )
    jobs["PyTorchJob"] = {"$ref": "#/$defs/KubeflowOrgV1PyTorchJob", "$defs": kubeflow_definitions(wheels)}
    return lambda kind: Draft202012Validator(jobs[kind], registry=registry)


def kubeflow_definitions(wheels: Path) -> dict:
    """JSON schemas of Kubeflow's objects from its Python package, which is generated from their OpenAPI schema."""
    (wheel,) = wheels.glob("kubeflow_training-*.whl")
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(f"{KUBEFLOW}/kubeflow_org_v1"):
                text = archive.read(name).decode()
                (kind,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
                tables = {
                    node.targets[0].id: ast.literal_eval(node.value)
                    for node in kind.body
                    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
                }
                keys = tables["attribute_map"]
                found[kind.name] = {
                    "type": "object",
                    "properties": {keys[field]: schema_of(of) for field, of in tables["openapi_types"].items()},
                    "required": [keys[f] for f in keys if f"Invalid value for `{f}`, must not be `None`" in text],
                    "additionalProperties": False,
                }
    return found


def schema_of(name: str) -> dict:
    """The schema of a type as the package writes it, such as list[str] or dict(str, V1Volume)."""
    if name in KINDS:
        return {"type": KINDS[name]}
    if name.startswith("list["):
        return {"type": "array", "items": schema_of(name[5:-1])}
    if name.startswith("dict("):
        return {"type": "object", "additionalProperties": schema_of(name[5:-1].split(", ")[1])}
    if name == "V1PodTemplateSpec":
        return {"$ref": POD}
    return {"$ref": f"#/$defs/{name}"} if name.startswith("KubeflowOrgV1") else {}


def mistakes(validator, document: dict) -> list[str]:
    errors = validator(document["kind"]).iter_errors(document)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@pytest.mark.long
@pytest.mark.parametrize("name, kinds", [("job", ["Service", "Job"]), ("pytorchjob", ["PyTorchJob"])])
def test_the_published_schema_admits_it(validator, name, kinds):
    found = documents(name)
    assert [document["kind"] for document in found] == kinds
    for document in found:
        assert mistakes(validator, document) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["job", "pytorchjob"])
def test_the_schemas_do_find_mistakes(validator, name):
    document = documents(name)[-1]
    document["spec"]["restarts"] = 3
    pod_of(document)["containers"][0]["comand"] = ["bash"]
    pod_of(document)["terminationGracePeriodSeconds"] = "long"
    found = "\n".join(mistakes(validator, document))
    assert "'restarts' was unexpected" in found and "'comand' was unexpected" in found and "'long'" in found


def as_in_a_pod(container: dict, training: list) -> list[str]:
    """The container's command with a different recipe and flags, and with this Python."""
    command = [part.replace("python -m", f"{sys.executable} -m") for part in container["command"]]
    return [*command, *map(str, training)]


def training_of(run: Run) -> list:
    return [RECIPE, *("--run-name" if flag == "--run" else flag for flag in run.flags)]


@pytest.mark.long
@pytest.mark.skipif(not can_make_hosts(), reason="network namespaces can't be made: needs root and iproute2")
def test_the_pods_of_the_job_find_each_other(tmp_path):
    job = documents("job")[-1]
    (container,) = pod_of(job)["containers"]
    name = job["metadata"]["name"]
    run = Run(tmp_path, world_size=4)
    given = {key: value for key, value in environment(container).items() if value is not None}
    given |= {"RUN": name, "NUM_GPUS": "2"}
    with Hosts(names=[f"{name}-{index}.{name}" for index in (0, 1)]) as hosts:
        outputs = [tmp_path / f"pod{index}.txt" for index in (0, 1)]
        command = as_in_a_pod(container, training_of(run))
        pods = [
            hosts.start(index, command, outputs[index], {**given, "JOB_COMPLETION_INDEX": str(index)})
            for index in (0, 1)
        ]
        try:
            codes = [pod.wait(150) for pod in pods]
        finally:
            end(*pods)
    assert codes == [0, 0], "\n".join(output.read_text()[-3000:] for output in outputs)
    described = json.loads((run.place / "run.json").read_text())
    assert described["status"] == "finished" and described["world_size"] == 4


@pytest.mark.long
def test_a_pod_of_the_pytorchjob_that_is_evicted_saves_and_asks_to_be_recreated(tmp_path):
    (container,) = pod_of(documents("pytorchjob")[0])["containers"]
    run = Run(tmp_path, "--epochs", 2000, "--no-report", world_size=2)
    given = {key: value for key, value in environment(container).items() if value is not None}
    given |= {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_STANDALONE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "pod.txt").open("w") as output:
        pod = subprocess.Popen(
            as_in_a_pod(container, training_of(run)),
            env={**os.environ, **given},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 90
            while not (run.place / "metrics.jsonl").exists() or len(run.records()) < 3:
                assert time.monotonic() < deadline and pod.poll() is None, (tmp_path / "pod.txt").read_text()
                time.sleep(0.1)
            pod.send_signal(signal.SIGTERM)
            assert pod.wait(60) == 143, "from 128 on the operator recreates the pod"
        finally:
            end(pod)
    assert json.loads((run.place / "run.json").read_text())["status"] == "preempted"
