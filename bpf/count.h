/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Counters. */
#ifndef PROBELET_COUNT_H
#define PROBELET_COUNT_H

#include "maps.h"

static __always_inline void add(void *per_cpu_array, __u32 index, __u64 n)
{
	__u64 *value = bpf_map_lookup_elem(per_cpu_array, &index);

	if (value)
		*value += n;
}

static __always_inline void count(__u32 counter)
{
	add(&counters, counter, 1);
}

static __always_inline void count_age(__u64 age)
{
	const __u64 bounds[] = AGE_BOUNDS;
	__u32 bucket = 0;

	for (__u32 i = 0; i < AGE_BOUNDED; i++)
		bucket += age > bounds[i];
	add(&answer_ages, bucket, 1);
	add(&answer_ages, AGE_SUM, age);
}

#endif
