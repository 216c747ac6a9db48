/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The kernel's internal types and constants, as far as the programs use them. */
#ifndef PROBELET_KERNEL_H
#define PROBELET_KERNEL_H

#include <linux/types.h>

#define SOCK_STREAM 1 /* enum sock_type in include/linux/net.h */

#define STATE_CLOSE 7	/* TCP_CLOSE in include/net/tcp_states.h */
#define STATE_LISTEN 10 /* TCP_LISTEN */
#define STATE_NEW_SYN_RECV 12

#define CA_LOSS 4 /* TCP_CA_Loss in include/uapi/linux/tcp.h */

/* Only the fields that the programs read. CO-RE relocates their offsets to those of the running kernel. */
#define KERNEL_TYPE __attribute__((preserve_access_index))
struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;
struct net {
	struct ns_common ns;
	__u64 net_cookie;
} KERNEL_TYPE;
typedef struct {
	struct net *net;
} KERNEL_TYPE possible_net_t;
struct sock;
struct sock_common {
	struct sock *skc_listener; /* of a request_sock */
	volatile unsigned char skc_state;
	unsigned char skc_reuseport : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
} KERNEL_TYPE;
struct sk_filter;
struct sock {
	struct sock_common __sk_common;
	struct sk_filter *sk_filter;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
} KERNEL_TYPE;
struct ipv6_pinfo {
	__u8 min_hopcount;
} KERNEL_TYPE;
struct inet_sock {
	struct sock sk;
	struct ipv6_pinfo *pinet6;
	__u8 min_ttl;
} KERNEL_TYPE;
typedef struct {
	int counter;
} KERNEL_TYPE atomic_t;
struct request_sock {
	struct sock_common __req_common;
} KERNEL_TYPE;
struct request_sock_queue {
	atomic_t qlen;
	struct request_sock *rskq_accept_head;
} KERNEL_TYPE;
struct inet_connection_sock {
	struct inet_sock icsk_inet;
	struct request_sock_queue icsk_accept_queue;
	__u8 icsk_ca_state : 5;
	__u8 icsk_retransmits; /* in a row, without an acknowledgement since */
} KERNEL_TYPE;
struct tcp_md5sig_info;
struct tcp_ao_info;
struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 snd_wnd;			     /* the peer's receive window, in bytes */
	struct tcp_md5sig_info *md5sig_info; /* CONFIG_TCP_MD5SIG */
	struct tcp_ao_info *ao_info;	     /* CONFIG_TCP_AO, since 6.7 */
} KERNEL_TYPE;
struct tcp_request_sock {
	__u64 snt_synack;
} KERNEL_TYPE;

struct pid_namespace {
	struct ns_common ns;
} KERNEL_TYPE;
struct upid {
	int nr;
	struct pid_namespace *ns;
} KERNEL_TYPE;
struct pid {
	unsigned int level;
	struct upid numbers[1];
} KERNEL_TYPE;
struct task_struct {
	struct task_struct *group_leader;
	struct pid *thread_pid;
} KERNEL_TYPE;

#endif
