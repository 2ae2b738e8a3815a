"""The OpenAI-compatible protocol: schemas, requests, responses, streams, tool calls and errors."""
