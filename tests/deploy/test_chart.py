"""What the chart makes of its values, and which values it refuses."""

import math
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.tools import values_schema
from skfac.service.config import ServiceConfig
from tests.support.chart import CHART, ROOT, Object, helm, only, rendered

CASES = sorted((CHART / "ci").glob("*-values.yaml"))
INSECURE = ("--set", "insecureRemote=true")
NAME = "prod-skfac"
GiB = 1024**3
FITTED = ("max_session_bytes", "max_history_bytes")  # to the memory of the pod


def everything() -> list[Object]:
    return rendered("-f", CHART / "ci/everything-values.yaml")


def settings_of(found: list[Object]) -> str:
    text: str = only(found, "ConfigMap", NAME)["data"]["skfac.toml"]
    return text


def pod_of(found: list[Object]) -> Object:
    spec: Object = only(found, "StatefulSet")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def load(tmp_path: Path):
    """Read settings as `skfac serve --config` does, on a machine without a GPU."""

    def load(text: str) -> ServiceConfig:
        file = tmp_path / "skfac.toml"
        file.write_text(text)
        return ServiceConfig.load(file, {"device": "cpu"})

    return load


def test_the_server_takes_the_settings_that_are_rendered(load):
    config = load(settings_of(everything()))

    assert config.max_snapshot_bytes == 8589934592
    assert (config.lease_s, config.assembly_timeout_s) == (120, 2.5)
    assert config.log_level == "debug"


@pytest.mark.parametrize(
    ("memory", "nbytes"),
    [
        ("4Gi", 4 * GiB),
        ("4096Mi", 4 * GiB),
        ("1.5Gi", 3 * GiB // 2),
        ("512Ki", 512 * 1024),
        ("2Ti", 2048 * GiB),
        ("4G", 4_000_000_000),
        ("1500M", 1_500_000_000),
        ("4000000000000m", 4_000_000_000),
        ('"5368709120"', 5 * GiB),
        ("5368709120", 5 * GiB),
        ("2", 2),
    ],
)
def test_limits_are_a_quarter_of_the_memory(memory, nbytes, load, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text(f"resources: {{limits: {{memory: {memory}}}}}")
    config = load(settings_of(rendered(*INSECURE, "-f", values)))
    quarter = max(1, nbytes // 4)
    assert [getattr(config, name) for name in FITTED] == [quarter, quarter]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_pod_has_room_for_a_job_that_fills_its_limits(case, load):
    found = rendered("-f", case)
    config = load(settings_of(found))
    (container,) = pod_of(found)["containers"]
    volumes = {volume["name"]: volume for volume in pod_of(found)["volumes"]}
    memory, shared = (
        int(quantity.removesuffix("Gi")) * GiB
        for quantity in (
            container["resources"]["limits"]["memory"],
            volumes["shm"]["emptyDir"]["sizeLimit"],
        )
    )
    process = GiB // 2
    full = config.max_session_bytes + config.max_history_bytes
    assert full + shared + process <= memory


@pytest.mark.parametrize("name", FITTED)
def test_a_limit_that_is_named_stays(name, load):
    flags = ("--set-json", f"config.{name}=9999999999")
    config = load(settings_of(rendered(*INSECURE, *flags)))
    (other,) = {*FITTED} - {name}
    assert (getattr(config, name), getattr(config, other)) == (9999999999, GiB)


@pytest.mark.parametrize("nulled", ["resources.limits.memory", "resources.limits"])
def test_without_a_limit_of_memory_there_are_the_defaults(nulled):
    found = rendered(*INSECURE, "--set-json", f"{nulled}=null")
    assert not {*FITTED} & set(tomllib.loads(settings_of(found)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_ports_of_the_settings_are_those_of_the_pod(case, load):
    found = rendered("-f", case)
    config = load(settings_of(found))
    (container,) = pod_of(found)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    for name, address in (
        ("grpc", config.address),
        ("health", config.health_address),
        ("metrics", config.metrics_address),
    ):
        assert address.endswith(f":{ports[name]}")
    probes = {
        name: container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")
    }
    asked = {name: probe["grpc"] for name, probe in probes.items()}
    health = ports["health"]
    assert asked["startup"] == asked["liveness"] == {"port": health, "service": "live"}
    assert asked["readiness"] == {"port": health, "service": "ready"}
    assert probes["readiness"]["failureThreshold"] >= 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_pods_are_restricted(case):
    """Pod Security Standards, level restricted, and a root that cannot be written."""
    found = rendered("-f", case)
    for spec in (pod_of(found), only(found, "Pod")["spec"]):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert {key for v in spec["volumes"] for key in v} <= allowed | {"name"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not [p for p in container.get("ports", []) if "hostPort" in p]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_files_of_the_settings_are_mounted(case):
    found = rendered("-f", case)
    settings = tomllib.loads(settings_of(found))
    (container,) = pod_of(found)["containers"]
    volumes = {volume["name"]: volume for volume in pod_of(found)["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}

    for name in ("tls_certificate", "tls_key", "tls_client_ca", "access_file"):
        if name in settings:
            mounted = mounts[str(Path(settings[name]).parent)]
            # Readable for the group, which is fsGroup, and for nobody else.
            assert volumes[mounted]["secret"]["defaultMode"] == 0o440
    if "state_dir" in settings:
        claims = only(found, "StatefulSet")["spec"]["volumeClaimTemplates"]
        assert [c["metadata"]["name"] for c in claims] == [
            mounts[settings["state_dir"]]
        ]


def test_services_set_no_variables_that_look_like_settings():
    """A Service named skfac would set SKFAC_PORT, which the server refuses."""
    found = rendered(*INSECURE)
    for spec in (pod_of(found), only(found, "Pod")["spec"]):
        assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize(("grace_s", "sleep_s"), [(0.5, 0), (5.0, 5), (40.0, 30)])
def test_there_is_time_to_stop(grace_s, sleep_s):
    flags = (f"config.grace_s={grace_s}", f"preStopSleepSeconds={sleep_s}")
    set_ = [part for flag in flags for part in ("--set-json", flag)]
    pod = pod_of(rendered(*INSECURE, *set_))

    assert pod["terminationGracePeriodSeconds"] >= sleep_s + 2 * grace_s + 5
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == sleep_s


def test_saving_takes_time_of_its_own():
    without, with_state = (
        pod_of(rendered(*INSECURE, *flags))["terminationGracePeriodSeconds"]
        for flags in ((), ("--set", "state.enabled=true,state.saveSeconds=300"))
    )
    assert with_state == without + 300


def test_new_settings_start_the_servers_anew():
    sums = {
        only(rendered(*INSECURE, *flags), "StatefulSet")["spec"]["template"][
            "metadata"
        ]["annotations"]["checksum/config"]
        for flags in ((), ("--set", "config.lease_s=9"))
    }
    assert len(sums) == 2


def test_a_gpu_is_asked_for_tolerated_and_used():
    found = rendered("-f", CHART / "ci/gpu-values.yaml")
    pod = pod_of(found)
    (container,) = pod["containers"]

    assert container["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": 1}
    tolerated = [t["key"] for t in pod["tolerations"]]
    assert tolerated == ["training", "nvidia.com/gpu"]
    assert tomllib.loads(settings_of(found))["device"] == "cuda"


def test_an_autoscaler_owns_the_number_of_servers():
    found = rendered("-f", CHART / "ci/keda-values.yaml")
    assert "replicas" not in only(found, "StatefulSet")["spec"]
    scaled = only(found, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == NAME
    (trigger,) = scaled["triggers"]
    # A gauge: a raw counter would scale on the past.
    assert "skfac_queue_oldest_seconds{" in trigger["metadata"]["query"]
    assert 'namespace="training"' in trigger["metadata"]["query"]


def test_rules_and_dashboard_are_those_of_the_files():
    found = everything()
    rules = yaml.safe_load((ROOT / "deploy/helm/skfac/files/rules.yaml").read_text())
    board = (ROOT / "deploy/helm/skfac/files/dashboard.json").read_text()
    dashboard = only(found, "ConfigMap", f"{NAME}-dashboard")["data"]["skfac.json"]

    assert only(found, "PrometheusRule")["spec"] == rules
    assert dashboard.strip() == board.strip()


def test_the_packaged_chart_is_whole(tmp_path):
    """Links are followed: what is in a package does not need the repository."""
    ran = helm("package", CHART, "--destination", tmp_path)
    assert ran.returncode == 0, ran.stderr
    (package,) = tmp_path.glob("skfac-*.tgz")
    everything_values = CHART / "ci/everything-values.yaml"
    flags = ("--namespace", "training", "-f", everything_values)
    from_package = helm("template", "prod", package, *flags)
    from_folder = helm("template", "prod", CHART, *flags)
    assert from_package.stdout == from_folder.stdout != ""


def test_the_settings_of_the_schema_are_those_of_the_server():
    assert values_schema.TARGET.read_text() == values_schema.written(), (
        "Run `python deploy/tools/values_schema.py`."
    )


def test_every_value_is_known_to_the_schema():
    """With `additionalProperties: false` all over, lint would refuse the others."""

    def closed(schema):
        if schema.get("type") == "object" and "properties" in schema:
            yield schema.get("additionalProperties") is False
            for inner in schema["properties"].values():
                yield from closed(inner)

    schema = yaml.safe_load(values_schema.TARGET.read_text())
    assert all(closed(schema))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("replicas=0", "replicas"),
        ("replicas=two", "replicas"),
        ("colour=red", "colour"),
        ("config.colour=red", "colour"),
        ("config.lease_s=-1", "lease_s"),
        ("config.lease_s=x", "lease_s"),
        ("config.max_layers=0", "max_layers"),
        ("config.log_level=loud", "log_level"),
        ("config.address=0.0.0.0:1", "address"),
        ("config.insecure_remote=true", "insecure_remote"),
        ("image.tagg=1", "tagg"),
        ("image.digest=latest", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("tls.secretName=Not_A_Name", "secretName"),
        ("gpu.count=-1", "count"),
        ("gpu.resource=gpu", "resource"),
        ("shm.sizeLimit=big", "sizeLimit"),
        ("state.size=ten", "size"),
        ("state.accessModes={ReadOnlyMany}", "accessModes"),
        ("preStopSleepSeconds=-5", "preStopSleepSeconds"),
        ("networkPolicy.clients[0].pods.a=b", "pods"),
        ("keda.queueSeconds=0", "queueSeconds"),
        ("serviceMonitor.interval=15", "interval"),
        ("extraEnv[0].name=SKFAC_LEASE_S", "extraEnv"),
    ],
)
def test_a_wrong_value_is_refused_and_named(flag, named):
    ran = helm("template", CHART, *INSECURE, "--set", flag)
    assert ran.returncode != 0
    assert named in ran.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "Set tls.secretName"),
        ("insecureRemote=true,tls.secretName=a", "contradict"),
        ("insecureRemote=true,tls.clientCA=true", "needs tls.secretName"),
        ("tls.secretName=a", "access.secretName, or tls.clientCA=true"),
        ("insecureRemote=true,keda.enabled=true", "needs keda.prometheusAddress"),
        (
            "insecureRemote=true,keda.enabled=true,keda.prometheusAddress=http://p:1,keda.minReplicas=5",
            "keda.minReplicas=5 is more than keda.maxReplicas=4",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(flags, message):
    ran = helm("template", CHART, "--set", flags)
    assert ran.returncode != 0
    assert message in ran.stderr


def test_the_notes_name_the_target_and_warn():
    run = ("install", "prod", CHART, "--dry-run=client", "--namespace", "training")
    open_ = helm(*run, *INSECURE, "--set", "networkPolicy.enabled=false").stdout
    closed = helm(*run, "--set", "tls.secretName=a,tls.clientCA=true").stdout

    target = 'target="dns:///prod-skfac-headless.training.svc.cluster.local:50051"'
    assert target in open_
    assert target in closed
    assert "NOTHING IS ENCRYPTED" in open_
    assert "No NetworkPolicy" in open_
    assert "NOTHING IS ENCRYPTED" not in closed
    assert "No NetworkPolicy" not in closed


def test_the_grace_is_read_as_the_server_reads_it():
    """The chart's default is a copy of the server's."""
    text = (CHART / "templates/_helpers.tpl").read_text()
    default = ServiceConfig.model_fields["grace_s"].default
    assert f".Values.config.grace_s | default {math.trunc(default)} |" in text
