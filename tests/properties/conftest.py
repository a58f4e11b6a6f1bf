"""Fixtures of the property tests."""

from tests.models.harness import fresh_dynamo

__all__ = ["fresh_dynamo"]
