"""ops/rabbitmq and ops/redis: the same users at both, hashes alone, and rights that match what the worker sends.

Whether the rights are enough, and no more, is proven by tests/privileges_live.py on real servers.
"""

import base64
import hashlib
import json
import re

from .common import ROOT, within

DEFINITIONS = ROOT / "ops/rabbitmq/definitions.json"
USERS = ROOT / "ops/redis/users.acl"
STORE = ROOT / "src/store/scripts.rs"
PEOPLE = {"worker", "aggregator", "dashboard", "operator"}
SERVERS = {"replica", "sentinel"}  # Redis among themselves, in docker-compose.cluster.yml


def problems():
    yield from rabbitmq_problems(json.loads(DEFINITIONS.read_text()))
    yield from redis_problems(USERS.read_text())


def rabbitmq_problems(definitions):
    where, users = within(DEFINITIONS), {user["name"]: user for user in definitions["users"]}
    if set(users) != PEOPLE:
        yield f"{where}: the users must be {', '.join(sorted(PEOPLE))}"
    for name, user in users.items():
        digest = base64.b64decode(user["password_hash"])
        if digest[4:] != hashlib.sha256(digest[:4] + name.encode()).digest():
            yield f"{where}: the password of {name} is not '{name}', as docker-compose.yml says"
        if "administrator" in user["tags"]:
            yield f"{where}: {name} must not be administrator"
    rights = definitions["permissions"] + definitions["topic_permissions"]
    for right in rights:
        for kind in {"configure", "write", "read"} & set(right):
            if not re.fullmatch(r"\^.*\$", right[kind]):
                yield f"{where}: {kind} of {right['user']} must match whole names: ^...$"
            re.compile(right[kind])
    for name in PEOPLE - {right["user"] for right in definitions["permissions"]}:
        yield f"{where}: {name} has no permissions, so it cannot even connect to the vhost"
    for policy in definitions["policies"]:
        fixed = {"overflow", "delivery-limit", "dead-letter-exchange"} & set(policy["definition"])
        if re.search(policy["pattern"], "scorer.jobs.m") and fixed:
            yield f"{where}: the policy {policy['name']} sets {', '.join(sorted(fixed))}, which the job queues have as arguments"


def redis_problems(text):
    where, lines = within(USERS), {line.split()[1]: line.split()[2:] for line in text.splitlines()}
    if "off" not in lines.get("default", []):
        yield f"{where}: the user default must be off"
    if set(lines) - {"default", "health"} != PEOPLE | SERVERS:
        yield f"{where}: the users must be default, health, {', '.join(sorted(PEOPLE | SERVERS))}"
    for name in sorted((PEOPLE | SERVERS) & set(lines)):
        if "#" + hashlib.sha256(name.encode()).hexdigest() not in lines[name]:
            yield f"{where}: the password of {name} is not '{name}', as docker-compose.yml says"
        if any(word.startswith((">", "nopass")) for word in lines[name]):
            yield f"{where}: {name} has a password in clear, or none: write its hash (ops/hash-password)"
    for name, words in lines.items():
        if "-@all" not in words:
            yield f"{where}: {name} must begin with nothing: -@all"
    sent = {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", STORE.read_text())}
    for command in sorted(sent - {word[1:] for word in lines["worker"] if word.startswith("+")}):
        yield f"{where}: worker may not say {command.upper()}, which {within(STORE)} sends"
