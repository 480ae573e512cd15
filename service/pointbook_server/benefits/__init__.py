"""The catalogue of membership benefits, their issue dates and applicability."""
