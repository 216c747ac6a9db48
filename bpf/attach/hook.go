package attach

import (
	"fmt"

	"github.com/probelet/probelet/bpf/datapath"
)

// Hook selects where answers are made for a device. The empty value means HookTC.
type Hook string

// Hooks.
const (
	HookTC  Hook = "tc"  // in the tc program steer
	HookXDP Hook = "xdp" // in the XDP program respond, which then sees every packet that the pod sends
)

// ParseHook returns the hook with the given name. The error lists the valid names.
func ParseHook(name string) (Hook, error) {
	hook := Hook(name)
	if hook != HookTC && hook != HookXDP {
		return "", fmt.Errorf("must be %q or %q", HookTC, HookXDP)
	}
	return hook, nil
}

func (h Hook) kernel() datapath.Hook {
	if h == HookXDP {
		return datapath.HookXDP
	}
	return datapath.HookTC
}
