"""After DEPT's pre-training: one embedding for a body that sites trained with their own, and the body's worth."""
