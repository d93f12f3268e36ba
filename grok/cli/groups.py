"""Groups of commands: their help in sentences that are never cut, by subject, with examples."""

import click

# By subject, the sentence of each command of `grok`.
SUBJECTS = {
    "Begin": {
        "quickstart": "Train, stop, resume and sample a small model on this machine's CPU.",
        "config": "Print every setting of a preset or file.",
    },
    "Train": {
        "data": "Train tokenizers, and make and inspect datasets of tokens.",
        "train": "Train from scratch, or on from weights or a checkpoint.",
        "report": "Draw a run, or compare several, on one page.",
        "profile": "Profile steps of a run while it goes on.",
        "replay": "Repeat steps of a run and compare them bit for bit.",
    },
    "Use": {
        "sample": "Continue text in this terminal.",
        "chat": "Chat in this terminal.",
        "batch": "Answer files of prompts.",
        "serve": "Answer over HTTP as OpenAI's API does.",
        "eval": "Measure weights on texts and on tasks of lm-eval.",
    },
    "Weights": {
        "import": "Bring weights into a checkpoint of grok.",
        "export": "Write weights in a format of other programs.",
        "inspect": "Show what weights are at a path, and whether they are complete.",
        "verify": "Compare weights with others, or with their checksums.",
    },
    "TPUs": {
        "plan": "Compile a step for a slice without one, and estimate it.",
        "calibrate": "Check every kernel and measure the devices that are here.",
    },
}
EXAMPLES = {
    "quickstart": "grok quickstart",
    "config": "grok config grok-10m train.steps=500",
    "data tokenizer": "grok data tokenizer text/*.txt --vocab-size 8192 --out text.model",
    "data prepare": "grok data prepare text --tokenizer text.model --out data",
    "data inspect": "grok data inspect data --check",
    "train": "grok train grok-10m data.tokenizer=text.model data.train=[text]",
    "report": "grok report runs/first runs/second",
    "profile": "grok profile runs/first --steps 3",
    "replay": "grok replay runs/quickstart",
    "sample": "grok sample runs/quickstart --prompt 'The assignment' --max-tokens 64",
    "chat": "grok chat runs/tuned --temperature 0.5",
    "batch": "grok batch grok-1-v6e input=[prompts.jsonl] output=answers",
    "serve": "grok serve runs/quickstart port=8000",
    "eval": "grok eval runs/quickstart --data runs/quickstart/heldout.txt",
    "import xai": "grok import xai ckpt-0 grok-1 --dtype bfloat16",
    "import hf": "grok import hf hf://mistralai/Mistral-7B-v0.3 mistral",
    "export hf": "grok export hf runs/quickstart quickstart-hf",
    "export gguf": "grok export gguf runs/quickstart quickstart.gguf --dtype q8_0",
    "export peft": "grok export peft runs/adapted adapters --base-weights xai-org/grok-1",
    "export params": "grok export params runs/quickstart quickstart-params",
    "inspect": "grok inspect runs/quickstart",
    "verify": "grok verify runs/quickstart quickstart-hf",
    "plan": "grok plan train-v5p-4x4x8 data.batch_size=128",
    "calibrate": "grok calibrate --out calibration.json",
}


class Group(click.Group):
    """A group that lists its commands by subject, in sentences that are never cut."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Adds a command, with its example below its help."""
        super().add_command(cmd, name)
        path = cmd.name if self.name == "grok" else f"{self.name} {cmd.name}"
        if path in EXAMPLES:
            cmd.epilog = f"\b\nExample:\n  {EXAMPLES[path]}"

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands and their sentences."""
        if self.name == "grok":
            for subject, sentences in SUBJECTS.items():
                with formatter.section(subject):
                    formatter.write_dl(list(sentences.items()))
            return
        with formatter.section("Commands"):
            names = sorted(self.commands)
            formatter.write_dl([(n, self.commands[n].get_short_help_str(1000)) for n in names])
