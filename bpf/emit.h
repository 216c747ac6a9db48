/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Writing segments: turns a packet into another one in place, either completely or not at all. */
#ifndef PROBELET_EMIT_H
#define PROBELET_EMIT_H

#include "maps.h"
#include "parse.h"

/* Describes the segment that a packet is turned into. */
struct outgoing {
	__u32 seq;
	__u32 ack;
	__u16 mss; /* 0: no MSS option */
	__u16 window;
	__u16 payload; /* bytes */
	__u8 tcp_flags;
	bool back;	   /* swap source and destination */
	__u32 payload_sum; /* ones' complement sum, not folded */
};

/* Returns the ones' complement sum, not folded, which is independent of byte order and word size (RFC 1071). */
static __always_inline __u64 sum_words(const void *words, __u32 bytes)
{
	const __u32 *word = words;
	__u64 sum = 0;

	for (__u32 i = 0; i < bytes / 4; i++)
		sum += word[i];
	return sum;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* Returns the sum of the TCP pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1). */
static __always_inline __u64 pseudo_sum(const void *ip, __u32 l3_len, __u32 tcp_bytes)
{
	__u64 sum = bpf_htonl(tcp_bytes) + (__u64)bpf_htonl(IPPROTO_TCP);

	if (l3_len == sizeof(struct iphdr))
		return sum + sum_words(ip + offsetof(struct iphdr, saddr), 8);
	return sum + sum_words(ip + offsetof(struct ipv6hdr, saddr), 32);
}

static __always_inline void swap_bytes(void *a, void *b, __u32 bytes)
{
	__u8 saved[16];

	__builtin_memcpy(saved, a, bytes);
	__builtin_memcpy(a, b, bytes);
	__builtin_memcpy(b, saved, bytes);
}

static __always_inline __u32 tcp_len_of(const struct outgoing *out)
{
	return sizeof(struct tcphdr) + (out->mss ? 4 : 0);
}

/*
 * Rewrites the headers at eth. l3_len, the length of the network header, is a constant in every call, and there must be
 * room for an MSS option behind the TCP header. Leaves the TCP checksum 0 and returns the sum of TCP header and
 * payload.
 */
static __always_inline __u64 write_headers(struct ethhdr *eth, __u32 l3_len, const struct outgoing *out)
{
	void *ip = eth + 1;
	struct tcphdr *tcp = ip + l3_len;
	__u32 *option = (void *)(tcp + 1), tcp_bytes = tcp_len_of(out) + out->payload;
	__u64 sum;

	if (out->back) {
		swap_bytes(eth->h_source, eth->h_dest, ETH_ALEN);
		swap_bytes(&tcp->source, &tcp->dest, 2);
	}
	tcp->seq = bpf_htonl(out->seq);
	tcp->ack_seq = bpf_htonl(out->ack);
	((__u8 *)tcp)[12] = tcp_len_of(out) / 4 << 4;
	((__u8 *)tcp)[13] = out->tcp_flags;
	tcp->window = bpf_htons(out->window);
	tcp->check = 0;
	tcp->urg_ptr = 0;
	sum = sum_words(tcp, sizeof(*tcp)) + out->payload_sum;
	if (out->mss) {
		*option = bpf_htonl(2 << 24 | 4 << 16 | out->mss);
		sum += *option;
	}

	if (l3_len == sizeof(struct iphdr)) {
		struct iphdr *v4 = ip;

		if (out->back)
			swap_bytes(&v4->saddr, &v4->daddr, 4);
		v4->tos = 0;
		v4->tot_len = bpf_htons(sizeof(*v4) + tcp_bytes);
		v4->id = 0;
		v4->frag_off = bpf_htons(0x4000); /* don't fragment */
		v4->ttl = 64;
		v4->check = 0;
		v4->check = ~fold(sum_words(v4, sizeof(*v4)));
	} else {
		struct ipv6hdr *v6 = ip;

		if (out->back)
			swap_bytes(&v6->saddr, &v6->daddr, 16);
		*(__be32 *)v6 = bpf_htonl(6 << 28); /* no traffic class, no flow label */
		v6->payload_len = bpf_htons(tcp_bytes);
		v6->hop_limit = 64;
	}
	return sum;
}

/*
 * Turns a packet at tc into the segment out, with payload from bytes. Returns false if the packet must be dropped.
 *
 * Checksums: a packet that never left the machine carries only the sum of the pseudo-header (CHECKSUM_PARTIAL), to be
 * completed later; one from a device without checksum offload carries the full sum. We cannot tell them apart, but
 * bpf_l4_csum_replace can. So we write the former and pass the difference to the latter, which the helper applies only
 * to packets that need it.
 */
static __always_inline bool emit_with(struct __sk_buff *skb, __u32 l3_len, const struct outgoing *out,
				      const void *bytes, __u32 max)
{
	struct {
		__u8 pad[2]; /* aligns the IP header */
		struct ethhdr eth;
		__u8 rest[sizeof(struct ipv6hdr) + sizeof(struct tcphdr) + 4];
	} head;
	__u32 tcp_len = tcp_len_of(out), payload = out->payload, tcp = ETH_HLEN + l3_len;
	__u64 sum, pseudo;

	if (bpf_skb_load_bytes(skb, 0, &head.eth, ETH_HLEN + l3_len + sizeof(struct tcphdr)))
		return false;
	sum = write_headers(&head.eth, l3_len, out);
	pseudo = fold(pseudo_sum(head.rest, l3_len, tcp_len + payload));
	((struct tcphdr *)(head.rest + l3_len))->check = pseudo;
	/* This also undoes segmentation offload. */
	if (bpf_skb_change_tail(skb, tcp + tcp_len + payload, 0))
		return false;
	if (out->mss ? bpf_skb_store_bytes(skb, 0, &head.eth, ETH_HLEN + l3_len + sizeof(struct tcphdr) + 4,
					   BPF_F_RECOMPUTE_CSUM)
		     : bpf_skb_store_bytes(skb, 0, &head.eth, ETH_HLEN + l3_len + sizeof(struct tcphdr),
					   BPF_F_RECOMPUTE_CSUM))
		return false;
	if (bytes && payload) {
		asm volatile("" : "+r"(payload)); /* as in store, for verifiers before 6.3 */
		payload = ((payload - 1) & (max - 1)) + 1;
		if (bpf_skb_store_bytes(skb, tcp + tcp_len, bytes, payload, BPF_F_RECOMPUTE_CSUM))
			return false;
	}
	return !bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), 0, fold(sum + 2 * pseudo), 0);
}

/* Calls emit_with with a constant l3_len. max is the size of bytes, a power of two, or 0 if there is no payload. */
static __always_inline bool emit(struct __sk_buff *skb, __u32 l3_len, const struct outgoing *out, const void *bytes,
				 __u32 max)
{
	switch (l3_len) {
	case sizeof(struct iphdr):
		return emit_with(skb, sizeof(struct iphdr), out, bytes, max);
	case sizeof(struct ipv6hdr):
		return emit_with(skb, sizeof(struct ipv6hdr), out, bytes, max);
	}
	return false; /* a jumbo header, which no answerable segment has */
}

#endif
