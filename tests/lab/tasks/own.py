"""Files, descriptions and examples of one's own tasks, for the tests of them."""

from zokernels.lab.tasks import get_task


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def described(tmp_path, text, name="own.yaml"):
    return get_task(str(write(tmp_path / name, text)))


def examples(task, *given):
    return [e for i, row in enumerate(given) for e in task.read(row, f"row {i}")]
