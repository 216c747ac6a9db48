/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Recognising a prober's sockets where it shares its cgroup with other processes. A packet reveals the cgroup of its
 * socket but not the process, which is known only when the socket is created. So mark notes it then, in the storage of
 * the socket.
 */
#ifndef PROBELET_MARK_H
#define PROBELET_MARK_H

#include <bpf/bpf_core_read.h>

#include "kernel.h"
#include "maps.h"

#define PID_NAMESPACES_MAX 33 /* MAX_PID_NS_LEVEL in include/linux/pid_namespace.h, plus the initial one */

/*
 * Returns the PID of the current process in a namespace, or 0 if it has none there. The namespace need not be the
 * initial one, because a node may be a container.
 */
static __always_inline __u32 current_pid(__u32 namespace)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct pid *pid = BPF_CORE_READ(task, group_leader, thread_pid);
	void *number = __builtin_preserve_access_index(&pid->numbers);
	__u32 level = BPF_CORE_READ(pid, level);

	for (__u32 i = 0; i < PID_NAMESPACES_MAX; i++) {
		struct upid *at = number + i * bpf_core_type_size(struct upid);

		if (i > level)
			break;
		if (BPF_CORE_READ(at, ns, ns.inum) == namespace)
			return BPF_CORE_READ(at, nr);
	}
	return 0;
}

/* Reports whether the socket of a packet was created by the process with the given PID. */
static __always_inline bool is_marked(struct __sk_buff *skb, __u32 pid)
{
	struct bpf_sock *sk = skb->sk;
	__u32 *creator;

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	creator = bpf_sk_storage_get(&prober_sockets, sk, NULL, 0);
	return creator && *creator == pid;
}

#endif
