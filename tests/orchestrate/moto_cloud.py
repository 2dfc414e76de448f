"""`ray up` against moto, until it has made the head: run inside a network namespace without routes, prints JSON.

    unshare --net --pid --fork --mount-proc python moto_cloud.py CLUSTER_FILE FOLDER

The cluster file names what it needs by values that end in -YOURS; they are made in moto and filled in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

PORT, REGION = 5000, "eu-central-1"
SECONDS = 240


def main(cluster_file: Path, folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert not subprocess.run(["ip", "route"], check=True, capture_output=True).stdout, "there are routes"
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(folder),
    }
    server = ThreadedMotoServer("127.0.0.1", PORT, verbose=False)
    server.start()
    ec2 = boto3.client("ec2", REGION)
    group = _make(ec2)
    text = cluster_file.read_text()
    for name, made in {**group, "BUCKET-YOURS": "bucket"}.items():
        text = text.replace(name, made)
    (folder / "cluster.yaml").write_text(text)
    log = folder / "ray_up.log"
    with log.open("wb") as out:
        command = [str(Path(sys.executable).parent / "ray"), "up", "-y", "--no-config-cache", "cluster.yaml"]
        up = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        until = time.monotonic() + SECONDS
        while not (instances := _instances(ec2)) and up.poll() is None and time.monotonic() < until:
            time.sleep(0.3)
    finally:
        up.kill()  # what it started ends with the namespace
        up.wait()
    groups = ec2.describe_security_groups()["SecurityGroups"]
    found = {"given": group["sg-YOURS"], "instances": instances, "groups": groups, "log": log.read_text()[-3000:]}
    print(json.dumps(found, default=str))
    server.stop()


def _make(ec2: Any) -> dict[str, str]:
    """Make in moto what the user has made before, as the comments of the cluster file say."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    group = ec2.create_security_group(GroupName="raystudy", Description="raystudy, closed", VpcId=vpc)["GroupId"]
    itself = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[itself])
    iam = boto3.client("iam", REGION)
    for profile in ("raystudy-head-YOURS", "raystudy-worker-YOURS"):
        iam.create_instance_profile(InstanceProfileName=profile)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    return {"subnet-YOURS": subnet, "sg-YOURS": group, "ami-YOURS": image}


def _instances(ec2: Any) -> list[dict[str, Any]]:
    """Return the instances that are complete: moto gives them their profile last."""
    made = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    return [i for i in made if "IamInstanceProfile" in i]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
