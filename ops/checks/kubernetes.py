"""ops/kubernetes: every object of both overlays holds to its schema, and what one names the other has."""

import tomllib

import kubernetes_validate
import yaml

from .common import METRICS_PORT, ROOT, seconds, unknown_settings, within

FOLDER = ROOT / "ops/kubernetes"
VERSION = "1.32"  # the oldest that is promised
KUSTOMIZATION = "kustomization.yaml"
# What KEDA's own schema asks for, as far as it is used here.
KEDA = {
    "ScaledObject": {"scaleTargetRef": dict, "minReplicaCount": int, "maxReplicaCount": int, "triggers": list, "advanced": dict,
                     "pollingInterval": int},
    "TriggerAuthentication": {"secretTargetRef": list},
}  # fmt: skip


def problems():
    for overlay in sorted((FOLDER / "overlays").iterdir()):
        where, objects = within(overlay), {}
        yield from gathered(overlay, objects)
        for (kind, name), thing in objects.items():
            if said := schema_problem(thing):
                yield f"{where}: {kind} {name}: {said}"
        yield from fleet_problems(where, objects)
    for file in sorted(FOLDER.rglob("*.*")):
        if file.name != KUSTOMIZATION and file.name not in (file.parent / KUSTOMIZATION).read_text():
            yield f"{within(file)}: {KUSTOMIZATION} beside it does not name it, so it is never applied"


def gathered(folder, objects):
    """Puts what a folder's kustomization makes into `objects`, as far as it is used here; says what it names in vain."""
    where, plan = within(folder / KUSTOMIZATION), yaml.safe_load((folder / KUSTOMIZATION).read_text())
    for name in plan.get("resources", []):
        path = (folder / name).resolve()
        if path.is_dir():
            yield from gathered(path, objects)
        elif path.is_file():
            objects.update({key(thing): thing for thing in yaml.safe_load_all(path.read_text())})
        else:
            yield f"{where}: there is no {name}"
    for generator in plan.get("configMapGenerator", []):
        objects["ConfigMap", generator["name"]] = {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]},
            "data": {name: (folder / name).read_text() for name in generator["files"] if (folder / name).is_file()},
        }  # fmt: skip
        yield from (f"{where}: there is no {name}" for name in generator["files"] if not (folder / name).is_file())
    for patch in plan.get("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        if key(change) not in objects:
            yield f"{where}: {patch['path']} changes {' '.join(key(change))}, which is not there"
        else:
            objects[key(change)] = merged(objects[key(change)], change)


def key(thing):
    return thing["kind"], thing["metadata"]["name"]


def merged(old, new):
    """A strategic merge as far as it is used here: lists of named things by name, other lists whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: merged(old.get(name), value) for name, value in new.items()}
    if isinstance(old, list) and all(isinstance(item, dict) and "name" in item for item in old + new):
        names = {item["name"]: item for item in old}
        return list((names | {item["name"]: merged(names.get(item["name"]), item) for item in new}).values())
    return new


def schema_problem(thing):
    if thing["apiVersion"].startswith("keda.sh/"):
        wanted, spec = KEDA[thing["kind"]], thing["spec"]
        if unknown := set(spec) - set(wanted):
            return f"spec.{sorted(unknown)[0]} is not known to this check: correct it, or add it to ops/checks/kubernetes.py"
        wrong = [name for name, kind in wanted.items() if not isinstance(spec.get(name), kind)]
        return f"spec.{wrong[0]} must be {wanted[wrong[0]].__name__}" if wrong else None
    try:
        kubernetes_validate.validate(thing, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"


def fleet_problems(where, objects):
    deployment, scaled = objects["Deployment", "scorer-worker"], objects["ScaledObject", "scorer-worker"]
    pod = deployment["spec"]["template"]
    [worker] = pod["spec"]["containers"]
    settings = tomllib.loads(objects["ConfigMap", "scorer-config"]["data"]["scorer.toml"])
    drain = seconds(settings["worker"]["drain_timeout"])
    if not pod["spec"]["terminationGracePeriodSeconds"] > drain:
        yield f"{where}: terminationGracePeriodSeconds must be longer than worker.drain_timeout ({drain} s)"
    if "replicas" in deployment["spec"]:
        yield f"{where}: the Deployment must not set replicas: each apply would undo what KEDA did"
    for probe, flag in (("startupProbe", "--live"), ("livenessProbe", "--live"), ("readinessProbe", "--ready")):
        if flag not in worker[probe]["exec"]["command"]:
            yield f"{where}: the {probe} must ask with {flag}: a worker that waits for its broker is live and not ready"
    written = [f"SCORER_{section}__{name}".upper() for section, names in settings.items() for name in names]
    for name in unknown_settings([variable["name"] for variable in worker["env"]] + written):
        yield f"{where}: {name} is no key of the configuration"
    if not settings["telemetry"]["metrics_addr"].endswith(f":{METRICS_PORT}"):
        yield f"{where}: telemetry.metrics_addr must have the port {METRICS_PORT}, where Prometheus looks"
    yield from reference_problems(where, objects, pod, scaled)
    yield from scaling_problems(where, scaled["spec"])
    yield from device_problems(where, worker)
    yield from hardening_problems(where, pod["spec"], worker)


def reference_problems(where, objects, pod, scaled):
    target = scaled["spec"]["scaleTargetRef"]["name"]
    if ("Deployment", target) not in objects:
        yield f"{where}: the ScaledObject scales {target}, which is no Deployment"
    for trigger in scaled["spec"]["triggers"]:
        if ("TriggerAuthentication", trigger["authenticationRef"]["name"]) not in objects:
            yield f"{where}: the ScaledObject's authenticationRef {trigger['authenticationRef']['name']} is not there"
    labels = pod["metadata"]["labels"].items()
    selectors = {"PodDisruptionBudget": "selector", "NetworkPolicy": "podSelector", "Deployment": "selector"}
    for (kind, name), thing in objects.items():
        if kind in selectors and not thing["spec"][selectors[kind]]["matchLabels"].items() <= labels:
            yield f"{where}: {kind} {name} does not select the workers' pods"
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    for mount in pod["spec"]["containers"][0]["volumeMounts"]:
        if mount["name"] not in volumes:
            yield f"{where}: the volume {mount['name']} is mounted and not declared"
    for volume in pod["spec"]["volumes"]:
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in objects:
            yield f"{where}: the ConfigMap {volume['configMap']['name']} is not there"


def scaling_problems(where, spec):
    """Workers come with the queue's length and go slowly, one at a time: each that goes hands back what it does not finish."""
    for trigger in spec["triggers"]:
        asked = trigger["metadata"]
        if (asked.get("mode"), asked.get("value", "").isdigit()) != ("QueueLength", True) or not asked.get("queueName", "").startswith("scorer.jobs."):
            yield f"{where}: the ScaledObject must scale by the QueueLength of scorer.jobs.MODEL"
    leaving = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    if leaving["stabilizationWindowSeconds"] < 300 or [policy["value"] for policy in leaving["policies"]] != [1]:
        yield f"{where}: the ScaledObject must take workers away one at a time, and only after some minutes"


def device_problems(where, worker):
    """A worker has one GPU and sees no other."""
    environment = {variable["name"]: variable.get("value") for variable in worker["env"]}
    wanted = "1" if environment.get("SCORER_ENGINE__EXECUTION_PROVIDER") == "cuda" else None
    if worker["resources"]["limits"].get("nvidia.com/gpu") != wanted:
        yield f"{where}: a worker must ask for {'one' if wanted else 'no'} nvidia.com/gpu"
    if "SCORER_ENGINE__DEVICE_ID" in environment:
        yield f"{where}: SCORER_ENGINE__DEVICE_ID must not be set: a pod's GPU is its device 0"


def hardening_problems(where, pod, worker):
    if not pod["securityContext"].get("runAsNonRoot") or pod["securityContext"]["seccompProfile"]["type"] != "RuntimeDefault":
        yield f"{where}: the pod must have runAsNonRoot and seccompProfile RuntimeDefault"
    container = worker["securityContext"]
    if not container.get("readOnlyRootFilesystem") or container.get("allowPrivilegeEscalation", True):
        yield f"{where}: the container must have readOnlyRootFilesystem and no allowPrivilegeEscalation"
    if container["capabilities"].get("drop") != ["ALL"]:
        yield f"{where}: the container must drop ALL capabilities"
