import time, copy
class Tok:
    eos_token_id=1
    def decode(self, ids): return str(ids)
    def batch_decode(self, seqs, **k): return [str(list(s)) for s in seqs]
def work(payload):
    from remax_megatron.parallel.layout import init_distributed, init_model_parallel
    device = init_distributed("cpu", 120)
    from remax_megatron.config.model_facts import ModelFacts
    from remax_megatron.config.schema import Actor, RolloutConfig
    from remax_megatron.policy.policy import Policy
    from remax_megatron.rollout.engine import Engine
    from remax_megatron.rollout.bridge import Bridge, CanaryError
    from remax_megatron.types import Row, Prompt
    case = payload
    layout = init_model_parallel(device, tp=case["tp"], pp=case["pp"], vpp=case.get("vpp"), seed=1)
    facts = ModelFacts.from_folder(case["folder"])
    actor = Actor(); actor.ppo_max_token_len_per_gpu=200; actor.megatron.dtype=case.get("dtype","float32"); actor.optim.lr=1e-3
    policy = Policy(facts, layout, actor, hf_folder=case["folder"], temperature=0.9, recompute=False)
    rc = RolloutConfig(); rc.tensor_model_parallel_size=case["rtp"]; rc.n=2; rc.temperature=0.9; rc.kv_cache_gib=0.1; rc.max_num_seqs=64
    t=time.time()
    engine = Engine(case["folder"], Tok(), rc, dtype=actor.megatron.dtype, max_prompt_length=64, max_response_length=24, seed=3, device=device, tied_embeddings=facts.tied_embeddings)
    out=[("start", time.time()-t)]
    prompts=[Prompt(i, tuple((7*i+3*j)%200+2 for j in range(40)),"x","y") for i in range(8)]
    bridge = Bridge(policy, engine, prompts, dtype=actor.megatron.dtype, bucket_bytes=case.get("bucket",50000), threshold=None, seed=3)
    for step in range(3):
        out.append(bridge.sync())
        t=time.time(); n=len(prompts)//engine.num_replicas
        ro=engine.rollout(prompts[engine.replica*n:(engine.replica+1)*n], step=step, weight_version=bridge.weight_version)
        out.append(("gen", time.time()-t, sum(len(s.token_ids) for r in ro for s in r.samples), ro[0].samples[0].token_ids[:5], ro[0].greedy.token_ids[:5]))
        import torch.distributed as dist
        allr=[None]*dist.get_world_size(); dist.all_gather_object(allr, ro if engine.leads_replica else [])
        rows=[Row(r.prompt.token_ids, s.token_ids, [1.0 if i%2 else -1.0]*len(s.token_ids), s.logprobs) for x in allr for r in x for i,s in enumerate(r.samples)]
        u=policy.update(rows); out.append(u)
    return out
