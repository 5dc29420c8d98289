"""Score distillation: match the teacher's distribution."""
