"""What every module stands on: settings, database, scope, errors, HTTP. Knows no domain."""
