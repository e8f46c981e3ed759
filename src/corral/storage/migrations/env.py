"""What Alembic runs for a migration; the connection, and the transaction on it, are the caller's."""

from __future__ import annotations

from alembic import context

from corral.storage.tables import metadata

connection = context.config.attributes["connection"]
# Alembic leaves a transaction that it finds alone. Whether there is one it asks SQLAlchemy,
# which knows nothing of a BEGIN that the store sent itself.
if not connection.in_transaction():
    connection.begin()
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
