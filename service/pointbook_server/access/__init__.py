"""Who may call what: tokens, scopes and merchants."""
