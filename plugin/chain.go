package main

import (
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"

	"github.com/probelet/probelet/bpf/attach"
)

const (
	pluginType = "probelet"
	// bandwidthType adds an ingress qdisc to the host-side veth of a pod that has an egress limit.
	bandwidthType = "bandwidth"
	// defaultNetDir is where runtimes keep network configurations by default.
	defaultNetDir = "/etc/cni/net.d"
	// netDirVariable overrides defaultNetDir. cnitool reads it, and a plugin inherits the environment of its runtime.
	netDirVariable = "NETCONFPATH"
)

// qdiscless lists plugins that add no qdisc: ours, and the chained ones of github.com/containernetworking/plugins (1.9).
var qdiscless = []string{pluginType, "firewall", "portmap", "sbr", "tuning", "vrf"}

// attachVia decides how ADD attaches. A device cannot have both clsact and an ingress qdisc: once we have added clsact, a later
// plugin that adds an ingress qdisc fails, and the pod does not start. tcx has no such conflict, but it waits for two RCU grace
// periods and needs Linux 6.6. So ADD uses clsact if the network's configuration on disk shows that no such plugin follows, and tcx
// if it does not. Where bandwidth follows and the kernel lacks tcx, ADD fails, and the daemon attaches once the chain has finished.
// The daemon also replaces clsact with tcx.
func attachVia(network string) attach.Via {
	followers, found := followersIn(cmp.Or(os.Getenv(netDirVariable), defaultNetDir), network)
	switch {
	case slices.Contains(followers, bandwidthType):
		return attach.ViaTCX
	case found && !slices.ContainsFunc(followers, mayAddQdisc):
		return attach.ViaClsact
	default:
		return attach.ViaAuto
	}
}

func mayAddQdisc(plugin string) bool { return !slices.Contains(qdiscless, plugin) }

// followersIn returns the types of the plugins that follow ours in a network's chain, and reports whether any chain contains ours.
// Several files may define a chain of that name, and the runtime determines which one counts, so the followers in all of them are
// returned. Unreadable lists are skipped, because the runtime cannot have read them either.
func followersIn(netDir, network string) (followers []string, found bool) {
	appended := typesIn(filepath.Join(netDir, network))
	for _, file := range filesIn(netDir, ".conflist") {
		var list struct {
			Name    string     `json:"name"`
			Plugins []typeOnly `json:"plugins"`
		}
		if !readJSON(file, &list) || list.Name != network {
			continue
		}
		chain := append(list.Plugins, appended...)
		if at := slices.Index(chain, typeOnly{pluginType}); at >= 0 {
			found = true
			for _, plugin := range chain[at+1:] {
				followers = append(followers, plugin.Type)
			}
		}
	}
	return followers, found
}

// typeOnly is a plugin's configuration reduced to its type.
type typeOnly struct {
	Type string `json:"type"`
}

// typesIn returns the plugins that libcni appends to a network's list, one from each file in the network's directory (CNI spec 1.1,
// section 1, "loadOnlyInlinedPlugins"). The type of an unreadable file is empty, because it may have been anything when the runtime
// read it.
func typesIn(dir string) (plugins []typeOnly) {
	for _, file := range filesIn(dir, ".conf") {
		var plugin typeOnly
		readJSON(file, &plugin)
		plugins = append(plugins, plugin)
	}
	return plugins
}

// filesIn returns the files with an extension in the order of libcni's ConfFiles, or none if the directory is unreadable.
func filesIn(dir, extension string) (files []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if !e.IsDir() && filepath.Ext(e.Name()) == extension {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files
}

// readJSON reads a JSON file and reports whether that succeeded.
func readJSON(file string, into any) bool {
	text, err := os.ReadFile(file)
	return err == nil && json.Unmarshal(text, into) == nil
}
