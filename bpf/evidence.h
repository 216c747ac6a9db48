/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Evidence about a pod's endpoints: reading it, withdrawing it, and noting answers. */
#ifndef PROBELET_EVIDENCE_H
#define PROBELET_EVIDENCE_H

#include "count.h"
#include "maps.h"

/* The prime of the 64-bit FNV hash. sealOf in bpf/datapath computes the same seal. */
#define SEAL_PRIME 0x100000001b3ULL

static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * SEAL_PRIME;
	return hash ^ hash >> 29;
}

static __always_inline __u64 seal_of(const struct endpoint_key *key, const struct evidence *e)
{
	__u64 hash = mix(0xcbf29ce484222325ULL, key->hash);

	hash = mix(hash, (__u64)key->device.ifindex << 32 | key->device.generation);
	hash = mix(hash, (__u64)key->port << 32 | (__u64)key->kind << 24 | (__u64)e->result << 16 | e->status);
	hash = mix(hash, e->observed_at);
	hash = mix(hash, e->fresh_until);
	return mix(hash, e->check);
}

static __always_inline struct endpoint_key endpoint(__u32 ifindex, __u32 generation, __u16 port, __u8 kind, __u64 hash)
{
	struct endpoint_key key = {.device = {ifindex, generation}, .port = port, .kind = kind, .hash = hash};

	return key;
}

/* Copies evidence to e. Returns false if there is none, or if it was replaced while being copied. */
static __always_inline bool read_evidence(const struct endpoint_key *key, struct evidence *e)
{
	struct evidence *found = bpf_map_lookup_elem(&endpoint_evidence, key);

	if (!found)
		return false;
	*e = *found;
	return e->seal == seal_of(key, e);
}

/*
 * Returns when the evidence of an endpoint or a port was last voided. Without a tally all of it is void. Call this
 * before reading the evidence: tallies are created before evidence, so no withdrawal is missed.
 */
static __always_inline __u64 withdrawn_at(const struct tally *tally)
{
	return tally ? tally->withdrawn_at : ~0ULL;
}

/*
 * Returns when all evidence about a device's pod was last voided. All of it is void once the device is detached or
 * attached again.
 */
static __always_inline __u64 pod_withdrawn_at(const struct device_key *key)
{
	struct device *device = bpf_map_lookup_elem(&devices, &key->ifindex);

	return device && device->generation == key->generation ? device->withdrawn_at : ~0ULL;
}

static __always_inline __u64 later(__u64 a, __u64 b)
{
	return a > b ? a : b;
}

/* Moves a time forward, never back: now may be earlier if taken on another CPU. Returns false if it did not move. */
static __always_inline bool advance(__u64 *time, __u64 now)
{
	for (int i = 0; i < 8; i++) {
		__u64 old = *time;

		if (old >= now)
			return false;
		if (__sync_val_compare_and_swap(time, old, now) == old)
			return true;
	}
	return false; /* others have just moved it eight times */
}

/* Voids the evidence of an endpoint, or with KIND_PORT of a whole port, and counts that if it was fresh. */
static __always_inline void withdraw(const struct endpoint_key *key, enum withdrawal_cause cause, __u32 counter)
{
	struct tally *tally = bpf_map_lookup_elem(&endpoint_tallies, key);
	__u64 before = withdrawn_at(tally), now = bpf_ktime_get_boot_ns();
	struct evidence e;

	if (!tally || !advance(&tally->withdrawn_at, now))
		return;
	tally->withdrawn_cause = cause;
	if (read_evidence(key, &e) && now < e.fresh_until && e.observed_at > before)
		count(counter);
}

static __always_inline void note_answer(const struct endpoint_key *key, struct tally *tally, __u64 observed_at,
					__u64 now)
{
	count(key->kind == KIND_HTTP ? COUNT_ANSWERED_HTTP : COUNT_ANSWERED_TCP);
	count_age(now - observed_at);
	if (!tally)
		return;
	__sync_fetch_and_add(&tally->hits, 1);
	tally->answered_at = now;
}

#endif
