"""Fixtures of the tests of faults."""

from tests.models.harness import fresh_dynamo

__all__ = ["fresh_dynamo"]
