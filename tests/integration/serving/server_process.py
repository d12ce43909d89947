"""A server process with an engine that answers when a file appears; for test_app.py."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc

from steersman.serving import app
from steersman.serving.metrics import Metrics
from steersman.serving.service import EngineDead
from steersman.serving.settings import ServerSettings
from steersman.v1 import policy_pb2, policy_pb2_grpc


class FileSettings(ServerSettings):
    folder: Path


class FileService(policy_pb2_grpc.PolicyServiceServicer):
    name = "file"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self, server)
        return [policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name]

    async def GetModel(self, request, context):
        (self._folder / "entered").touch()
        while not (self._folder / "answer").exists():
            await asyncio.sleep(0.01)
        return policy_pb2.PolicyServiceGetModelResponse()

    async def check_health(self) -> None:
        if (self._folder / "dead").exists():
            raise EngineDead("told to die")

    async def drain(self) -> None:
        (self._folder / "drained").touch()

    async def close(self) -> None:
        (self._folder / "closed").touch()


async def build(settings: FileSettings, metrics: Metrics) -> FileService:
    if not settings.folder.is_dir():
        raise ValueError(f"folder: is {settings.folder}, allowed: a folder that exists")
    return FileService(settings.folder)


if __name__ == "__main__":
    sys.exit(app.main("file", FileSettings, build))
