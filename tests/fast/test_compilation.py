"""Compiled layers compute the same. Layers are traced only: code generation takes minutes."""

import pytest
import torch
from transformers import DynamicCache

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.sampler import KeyedRows
from hf_speechllm.fast.attention import enable_padding_free
from hf_speechllm.fast.compilation import LayerGroup, compile_layers
from hf_speechllm.model.kv_cache import CACHE
from hf_speechllm.training import validation
from hf_speechllm.training.checkpointing import verification
from hf_speechllm.training.lora import add_lora


@pytest.fixture
def model(tiny_model):
    torch._dynamo.reset()
    return SpeechLLMForConditionalGeneration.from_pretrained(tiny_model).eval()


@pytest.fixture
def batches(tiny_model, tiny_rows):
    """Batches of several shapes; one batch has a single row."""
    collator = SpeechLLMCollator(SpeechLLMProcessor.from_pretrained(tiny_model))
    rows = KeyedRows(tiny_rows)
    return [collator(rows.__getitems__(list(keys))) for keys in (range(3), range(3, 8), range(8, 9), range(9, 13))]


def losses_and_gradients(model, batches):
    results = []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
        results.append((loss.detach(), gradients))
    return results


def assert_close(results, expected):
    for (loss, gradients), (reference, others) in zip(results, expected, strict=True):
        torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
        assert gradients.keys() == others.keys()
        for name in gradients:
            torch.testing.assert_close(gradients[name], others[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_gradients_are_the_same_for_every_shape(model, batches, lora):
    if lora:
        model.requires_grad_(False)
        model = add_lora(model, 2, 4, 0.0).eval()
    expected = losses_and_gradients(model, batches)
    assert compile_layers(model, backend="eager" if lora else "aot_eager") >= 3
    torch._dynamo.utils.counters.clear()
    assert_close(losses_and_gradients(model, batches[:2]), expected[:2])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    assert_close(losses_and_gradients(model, batches), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # other shapes use the same graphs
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("llm", "graphs"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}, 6),
        ({"model_type": "gemma3_text", "sliding_window": 4}, 6),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}, 4),
    ],
)
def test_llms_with_several_kinds_of_layers_or_tuples_compute_the_same(compose_tiny, tiny_config, batches, llm, graphs):
    config = tiny_config()
    config["llm_config"] |= llm
    model = compose_tiny(config)[0]
    expected = losses_and_gradients(model, batches[:1])
    torch._dynamo.reset()
    assert compile_layers(model, "eager") == graphs
    assert_close(losses_and_gradients(model, batches[:1]), expected)


def test_packed_rows_have_the_same_losses_and_gradients(model, batches, tiny_model, tiny_rows):
    expected = losses_and_gradients(model, batches[:1])
    enable_padding_free(model)
    compile_layers(model, backend="eager")
    collator = SpeechLLMCollator(SpeechLLMProcessor.from_pretrained(tiny_model), padding_free=True)
    torch._dynamo.utils.counters.clear()
    assert_close(losses_and_gradients(model, [collator(KeyedRows(tiny_rows).__getitems__([0, 1, 2]))]), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.fixture
def single_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_buckets_do_not_split_graphs(model, batches, single_process_group):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compile_layers(model, backend=count)
    model(**batches[0]).loss.backward()
    single_process = len(graphs)
    torch._dynamo.reset()
    parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-4, find_unused_parameters=True)
    parallel(**batches[0]).loss.backward()
    assert len(graphs) == 2 * single_process > 0


def test_gradient_checkpointing_recomputes_a_group(model, batches):
    expected = losses_and_gradients(model, batches[:1])
    compile_layers(model, backend="eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("hidden_dropout", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    assert_close(losses_and_gradients(model, batches[:1]), expected)


def test_names_weights_and_decoding_do_not_change(model, batches):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = {name: value[:2] for name, value in batches[0].items() if name not in ("labels", "positions")}
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    compile_layers(model, backend="eager")
    compile_layers(model, backend="eager")  # a second trainer of the same model
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), expected)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_passes_with_a_cache_are_not_compiled(model, batches):
    decoder = model.llm.get_decoder()
    compile_layers(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    embeds = model.get_input_embeddings()(batches[0]["input_ids"])
    decoder(inputs_embeds=embeds, **{CACHE: DynamicCache(config=decoder.config)})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    decoder(inputs_embeds=embeds, use_cache=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_trainer_compiles_on_request(make_trainer, monkeypatch):
    monkeypatch.setattr(LayerGroup, "__init__", with_backend("eager"))
    trainer = make_trainer(compile_layers=True, max_steps=2)
    trainer.train()
    plain = make_trainer(max_steps=2)
    plain.train()
    ours, theirs = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (trainer, plain))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 2


@pytest.fixture
def graphs_around(monkeypatch):
    """Counts compiled graphs before and after each call of one function."""
    monkeypatch.setattr(LayerGroup, "__init__", with_backend("eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def watch(module, name):
        graphs, function = [], getattr(module, name)

        def count(*args, **options):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            result = function(*args, **options)
            graphs.append((before, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
            return result

        monkeypatch.setattr(module, name, count)
        return graphs

    return watch


def test_verifying_a_checkpoint_compiles_nothing(make_trainer, graphs_around):
    graphs = graphs_around(verification.CheckpointVerifier, "verify")
    options = {"per_device_train_batch_seconds": 12, "save_strategy": "steps", "save_steps": 1}
    make_trainer(compile_layers=True, max_steps=2, **options).train()
    assert len(graphs) == 1 and 0 < graphs[0][0] == graphs[0][1]


def test_decoding_a_validation_set_compiles_nothing(make_trainer, tiny_rows, graphs_around):
    graphs = graphs_around(validation.Validator, "decode")
    options = {"eval_cer": True, "validation_file": ["dev.jsonl"], "eval_max_new_tokens": 4}
    rows = tiny_rows.select(range(4))
    make_trainer(compile_layers=True, padding_free=True, eval_dataset=rows, **options).evaluate()
    assert len(graphs) == 1 and 0 < graphs[0][0] == graphs[0][1]


def with_backend(name):
    original = LayerGroup.__init__
    return lambda self, layers, backend: original(self, layers, name)
