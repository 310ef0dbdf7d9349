"""The main job: from a model file and a spec to an artifact."""
