"""What veRL loads: importing it makes "outspoken" a backend of veRL's `Tracking`."""

from outspoken.diagnostics.integrations.verl import register

register()
