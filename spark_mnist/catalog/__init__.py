"""Operations on published versions: list, describe, delete, export, log to MLflow.

Runs on: driver.
"""
