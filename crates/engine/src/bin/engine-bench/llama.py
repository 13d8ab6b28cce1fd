import re
import sys
import time


def say(line):
    print("tandem: " + line, flush=True)


def token(at):
    # As in case.rs.
    return at * 7919 % 151936


class Model:
    def __init__(self, path, threads):
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"it does not load {path}")
        self.threads = threads

    def context(self, sequences, tokens):
        return Context(self.model, self.threads, sequences, tokens)

    def logits(self, tokens):
        context = self.context(1, len(tokens))
        context.decode(context.batch([(0, at, token) for at, token in enumerate(tokens)], [len(tokens) - 1]))
        logits = context.logits(len(tokens) - 1, lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))
        context.free()
        return logits

    def prefill(self, tokens, prompts):
        context = self.context(1, tokens)

        def rows(count):
            return context.batch([(0, at, token(at)) for at in range(count)], [count - 1])

        # Untimed: memory is touched for the first time.
        context.decode(rows(min(tokens, 512)))
        prompt = rows(tokens)

        def run():
            for _ in range(prompts):
                context.forget()
                context.decode(prompt)

        took = timed(run)
        context.free()
        return took

    def decode(self, sequences, tokens, steps):
        context = self.context(sequences, tokens + steps)
        self.fill(context, sequences, tokens - 1)

        def rows(at):
            rows = [(sequence, at, token(sequence + at)) for sequence in range(sequences)]
            return context.batch(rows, range(sequences))

        context.decode(rows(tokens - 1))
        batches = [rows(tokens + step) for step in range(steps)]
        took = timed(lambda: [context.decode(batch) for batch in batches])
        context.free()
        return took

    def fill(self, context, sequences, tokens):
        # The prompt is computed once; every sequence has a copy of its own.
        context.decode(context.batch([(0, at, token(at)) for at in range(tokens)], [tokens - 1]))
        for sequence in range(1, sequences):
            lib.llama_memory_seq_cp(context.memory, 0, sequence, -1, -1)


class Context:
    # Everything but threads and room is the library's default.
    def __init__(self, model, threads, sequences, tokens):
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * (-(-tokens // 256) * 256)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError("it makes no context")
        self.memory = lib.llama_get_memory(self.context)
        self.batches = []

    def batch(self, rows, sampled):
        batch = lib.llama_batch_init(len(rows), 0, 1)
        self.batches.append(batch)
        batch.n_tokens = len(rows)
        for i, (sequence, position, token) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in sampled
        return batch

    def decode(self, batch):
        status = lib.llama_decode(self.context, batch)
        lib.llama_synchronize(self.context)
        if status != 0:
            raise RuntimeError(f"a step ended with {status}")

    def forget(self):
        lib.llama_memory_clear(self.memory, False)

    def logits(self, row, vocab):
        return lib.llama_get_logits_ith(self.context, row)[:vocab]

    def free(self):
        for batch in self.batches:
            lib.llama_batch_free(batch)
        lib.llama_free(self.context)


def timed(work):
    wall, cpu = time.monotonic(), time.process_time()
    work()
    # CPU time of all threads.
    return f"took {time.process_time() - cpu} {time.monotonic() - wall}"


def answer(model, question, *numbers):
    numbers = [int(number) for number in numbers]
    if question == "logits":
        return "logits " + " ".join(map(str, model.logits(numbers)))
    return {"prefill": model.prefill, "decode": model.decode}[question](*numbers)


try:
    import llama_cpp.llama_cpp as lib
    from llama_cpp import __version__

    # Kept in a name for as long as the library may call it.
    silence = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model = Model(sys.argv[1], int(sys.argv[2]))
    built_with = re.findall(r"(\w+) = 1", lib.llama_print_system_info().decode())
    say(f"ready llama-cpp-python {__version__}: {' '.join(built_with)}")
    for line in sys.stdin:
        say(answer(model, *line.split()))
except Exception as error:
    say(f"failed {error}")
