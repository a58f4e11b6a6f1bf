"""Fixtures of the tests with whole models."""

from tests.models.harness import fresh_dynamo

__all__ = ["fresh_dynamo"]
