package datapath

// The object is committed so that building needs no clang. `make check` fails if it does not match the source.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package datapath -target bpfel -cc clang-19 -strip llvm-strip-19 -type device_key -type device -type endpoint_key -type endpoint_kind -type endpoint_list -type evidence -type evidence_result -type tally -type netns_devices -type prober_config -type record -type flow_key -type flow -type flow_state -type flow_flag -type order -type hook -type trust -type loss -type counter -type withdrawal_cause -type obstacle -type age probelet ../probelet.bpf.c -- -O2 -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -nostdinc -I../headers
