"""Multi-tenant, sharded conversation history for the OpenAI Agents SDK."""
