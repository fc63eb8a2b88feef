"""ops/check-files finds what it is there for: a copy of the files with one mistake of every kind gets a sentence for each."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
READ = ["docs", "ops", "schemas", "src", "docker-compose.yml", "docker-compose.nvidia.yml", "docker-compose.cluster.yml", "deny.toml", ".dockerignore", ".github"]

# File, what stands there, the mistake, a part of the sentence.
MISTAKES = [
    ("docker-compose.yml", "./ops/prometheus:/etc/prometheus:ro", "./ops/prometheus:/etc/prometheus", "could write to it"),
    ("docker-compose.yml", "./ops/grafana/dashboard.json", "./ops/grafana/board.json", "mounts ./ops/grafana/board.json"),
    ("docker-compose.yml", '"127.0.0.1:${PROMETHEUS_PORT', '"${PROMETHEUS_PORT', "is open to the network"),
    ("docker-compose.yml", "stop_grace_period: 75s", "stop_grace_period: 60s", "stop_grace_period must be longer"),
    ("docker-compose.yml", "0.0.0.0:9464", "0.0.0.0:9465", "where Prometheus looks"),
    ("docker-compose.yml", "SCORER_MODEL__DIR", "SCORER_MODEL__FOLDER", "SCORER_MODEL__FOLDER is no key"),
    ("src/cli/init/compose.yaml", "stop_grace_period: 75s", "stop_grace_period: 60s", "stop_grace_period must be longer"),
    ("src/cli/init/compose.yaml", "SCORER_AMQP__URL", "SCORER_AMQP__ADDRESS", "SCORER_AMQP__ADDRESS is no key"),
    ("schemas/asyncapi.yaml", "#/channels/queue.jobs\"", "#/channels/queue.work\"", "there is no channel queue.work"),
    ("docker-compose.nvidia.yml", 'device_ids: ["1"]', 'device_ids: ["0"]', "worker-gpu1 must reserve the GPU 1"),
    ("docker-compose.nvidia.yml", "worker-gpu3:", "worker-gpu8:", "worker-gpu8 must be worker-gpu3"),
    ("docker-compose.nvidia.yml", "aliases: [worker]", "aliases: [gpu]", "must have the alias worker"),
    ("docker-compose.cluster.yml", "hostname: rabbitmq-2", "hostname: rabbit2", "services.rabbitmq-2.hostname must be"),
    ("docker-compose.cluster.yml", "@sentinel-3:26379", "@sentinel-4:26379", "SCORER_REDIS__URL must name"),
    ("docker-compose.cluster.yml", "SCORER_REDIS__MASTER: mymaster", "SCORER_REDIS__MASTER: main", "what ops/redis/sentinel.conf watches"),
    ("ops/rabbitmq/cluster.conf", "rabbit@rabbitmq-3", "rabbit@rabbitmq-4", "ops/rabbitmq/cluster.conf names"),
    ("ops/rabbitmq/definitions.json", '"max-length-bytes": 8589934592', '"delivery-limit": 5', "which the job queues have"),
    ("ops/rabbitmq/definitions.json", '"management"', '"administrator"', "operator must not be administrator"),
    ("ops/redis/users.acl", "user default off", "user default on", "the user default must be off"),
    ("ops/redis/users.acl", " +zremrangebyscore", "", "worker may not say ZREMRANGEBYSCORE"),
    ("ops/prometheus/alerts.yml", "alert: ScorerMemoryGrowing", "alert: ScorerMemoryHuge", "no case in which ScorerMemoryHuge fires"),
    ("ops/prometheus/alerts.yml", "expr: scorer_broker_connected == 0", "expr: scorer_broker_up == 0", "uses scorer_broker_up"),
    ("ops/prometheus/alerts.yml", "#scorerjobsparked", "#parked", "must point to ops/runbook.md#scorerjobsparked"),
    ("ops/prometheus/alerts.yml", "for: 15m", "for: 1d", "promtool test rules"),
    ("ops/prometheus/alerts.yml", "scorer_stops_expected_contradictions_total", "scorer_stops_allowed_total", "is made of scorer_stops_allowed_total"),
    ("ops/prometheus/prometheus.yml", "job_name: scorer", "job_name: workers", "'scorer'"),
    ("ops/grafana/dashboard.json", "scorer_heartbeats_total", "scorer_beats_total", "uses scorer_beats_total"),
    ("ops/grafana/dashboard.json", "contradictions:increase7d", "contradictions:increase1d", "uses job:scorer_stops_expected_contradictions:increase1d"),
    ("ops/grafana/dashboard.json", '"expr": "sum(scorer_jobs_in_flight', '"expr": "sum((scorer_jobs_in_flight', "promtool check rules"),
    ("ops/grafana/provisioning/datasources/prometheus.yml", "uid: scorer-prometheus", "uid: other", "'scorer-prometheus' is not one of"),
    ("ops/kubernetes/base/deployment.yaml", "terminationGracePeriodSeconds: 75", "terminationGracePeriodSeconds: 60", "must be longer"),
    ("ops/kubernetes/base/deployment.yaml", "minReadySeconds: 5", "minReadySecond: 5", "minReadySecond"),
    ("ops/kubernetes/base/deployment.yaml", "--ready", "--live", "the readinessProbe must ask with --ready"),
    ("ops/kubernetes/base/scaledobject.yaml", "    name: scorer-worker\n", "    name: worker\n", "which is no Deployment"),
    ("ops/kubernetes/base/scaledobject.yaml", "pollingInterval:", "pollInterval:", "spec.pollInterval is not known"),
    ("ops/kubernetes/base/pdb.yaml", "component: worker", "component: scorer", "does not select the workers' pods"),
    ("ops/kubernetes/base/kustomization.yaml", "  - networkpolicy.yaml\n", "", "networkpolicy.yaml: kustomization.yaml beside it"),
    ("ops/kubernetes/overlays/cpu/worker.yaml", "value: cpu", "value: cuda", "must ask for one nvidia.com/gpu"),
    ("ops/kubernetes/overlays/cuda/scaledobject.yaml", "maxReplicaCount: 8", "maxReplicas: 8", "spec.maxReplicas is not known"),
    ("ops/kubernetes/overlays/cuda/worker.yaml", "name: scorer-worker", "name: worker", "changes Deployment worker"),
    ("ops/systemd/scorer.service", "TimeoutStopSec=75", "TimeoutStopSec=30", "TimeoutStopSec must be longer"),
    ("ops/systemd/scorer@.service", "StateDirectory=%N", "StateDirectory=scorer", "StateDirectory=scorer does not belong here"),
    ("ops/systemd/scorer@.service", "DEVICE_ID=%i", "DEVICE_ID=0", "DEVICE_ID=%i is missing"),
    ("ops/systemd/scorer@.service", "ProtectClock=yes\n", "ProtectClock=\n", "ProtectClock=yes is missing"),
    ("ops/systemd/scorer.service", "RestartPreventExitStatus=64", "RestartPreventExitStatus=70", "RestartPreventExitStatus must be '64'"),
    ("ops/Dockerfile.webgpu", "ops/webgpu.txt", "ops/vulkan.txt", "COPY ops/vulkan.txt: there is no such file"),
    (".github/workflows/release.yml", "ops/release ", "ops/publish ", "names ops/publish, which is not there"),
    (".github/workflows/release.yml", "needs: [test, install, images]", "needs: [install, images]", "jobs.publish publishes"),
    (".github/workflows/release.yml", "upload-artifact@v4", "upload-artifact@main", "is not pinned to a version"),
    (".github/workflows/release.yml", "id-token: write # for signing", "id-token: none", "jobs.images attests without"),
]  # fmt: skip


class Checks(unittest.TestCase):
    def check(self, mistakes):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name in READ:
                source = ROOT / name
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, root / name)
            for file, right, wrong, _ in mistakes:
                text = (root / file).read_text()
                self.assertIn(right, text, f"{file} does not hold what this test changes")
                (root / file).write_text(text.replace(right, wrong))
            return subprocess.run([sys.executable, root / "ops/check-files"], capture_output=True, text=True)

    def test_the_files_are_right(self):
        done = self.check([])
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_every_mistake_gets_its_sentence(self):
        done = self.check(MISTAKES)
        self.assertEqual(done.returncode, 1)
        for file, _, wrong, sentence in MISTAKES:
            with self.subTest(f"{file}: {wrong}"):
                self.assertTrue(sentence in done.stderr, f"nothing says '{sentence}'")


if __name__ == "__main__":
    unittest.main()
