"""Both models alive: starting the frameworks, watching the calls inside a model, precision, inputs."""
