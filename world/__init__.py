"""The built-in world: drawn pictures, spoken questions and tiny models of the real classes."""
