package runtimes

import (
	"slices"
	"strings"
	"testing"

	"github.com/probelet/probelet/daemon/internal/install/runtimes/runtimestest"
)

type files = map[string]string

// process returns a runtime's process with files below its root.
func process(t *testing.T, name string, args []string, root files) Runtime {
	t.Helper()
	return Runtime{Name: name, PID: "17", Dir: runtimestest.Proc(t, name, args, root)}
}

func TestBinDirs(t *testing.T) {
	const (
		v1 = "[plugins.cri.cni]\n bin_dir = '/v1'\n"
		v2 = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\n bin_dir = \"/v2\"\n conf_dir = \"/conf\"\n"
		v3 = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\n bin_dirs = ['/v3', '/more']\n"
	)
	const file = "etc/containerd/config.toml"
	for name, test := range map[string]struct {
		runtime string
		args    []string
		root    files
		want    []string
		err     string
	}{
		"containerd: no file":              {"containerd", nil, nil, nil, ""},
		"containerd: no setting":           {"containerd", nil, files{file: "version = 2\n"}, nil, ""},
		"containerd: empty":                {"containerd", nil, files{file: strings.Replace(v2, "/v2", "", 1)}, nil, ""},
		"containerd: version 1":            {"containerd", nil, files{file: v1}, []string{"/v1"}, ""},
		"containerd: version 2":            {"containerd", nil, files{file: v2}, []string{"/v2"}, ""},
		"containerd: version 3":            {"containerd", nil, files{file: v3}, []string{"/v3", "/more"}, ""},
		"containerd: bin_dir in version 3": {"containerd", nil, files{file: strings.Replace(v3, "bin_dirs = ['/v3', '/more']", "bin_dir = '/v3'", 1)}, []string{"/v3"}, ""},
		"containerd: flag":                 {"containerd", []string{"--config", "/k3s/config.toml"}, files{file: v1, "k3s/config.toml": v2}, []string{"/v2"}, ""},
		"containerd: flag with =":          {"containerd", []string{"-c=/k3s/config.toml"}, files{file: v1, "k3s/config.toml": v2}, []string{"/v2"}, ""},
		"containerd: imported":             {"containerd", nil, files{file: "imports = ['/etc/containerd/conf.d/*.toml']\n" + v1, "etc/containerd/conf.d/a.toml": v2, "etc/containerd/conf.d/b.toml": v3, "etc/containerd/conf.d/c.bak": v1}, []string{"/v3", "/more"}, ""},
		"containerd: relative import":      {"containerd", nil, files{file: "imports = ['more.toml', 'none.toml']\n", "etc/containerd/more.toml": "imports = ['config.toml']\n" + v2}, []string{"/v2"}, ""},
		"containerd: not TOML":             {"containerd", nil, files{file: "{"}, nil, "config.toml"},
		"containerd: an imported file replaces the section": {"containerd", nil, files{file: "imports = ['more.toml']\n" + v2,
			"etc/containerd/more.toml": "[plugins.\"io.containerd.grpc.v1.cri\"]\n x = 1\n"}, nil, ""},
		"containerd: nested imports": {"containerd", nil, files{file: "imports = ['a.toml', 'b.toml']\n", "etc/containerd/a.toml": "imports = ['c.toml']\n",
			"etc/containerd/b.toml": v1, "etc/containerd/c.toml": v2}, []string{"/v2"}, ""},
		"CRI-O: no file": {"crio", nil, nil, nil, ""},
		"CRI-O":          {"crio", nil, files{"etc/crio/crio.conf": "[crio.network]\nplugin_dirs = ['/a', '/b']\n"}, []string{"/a", "/b"}, ""},
		"CRI-O: old key": {"crio", nil, files{"etc/crio/crio.conf": "[crio.network]\nplugin_dir = '/a'\n"}, []string{"/a"}, ""},
		"CRI-O: drop-in": {"crio", nil, files{"etc/crio/crio.conf": "[crio.network]\nplugin_dirs = ['/a']\n",
			"etc/crio/crio.conf.d/10-x.conf": "[crio.network]\nplugin_dirs = ['/b']\n"}, []string{"/b"}, ""},
		"CRI-O: flags":         {"crio", []string{"--cni-plugin-dir", "/x,/y", "--cni-plugin-dir=/z"}, nil, []string{"/x", "/y", "/z"}, ""},
		"CRI-O: other files":   {"crio", []string{"--config=/o.conf", "-d", "/o.d"}, files{"o.conf": "", "o.d/1": "[crio.network]\nplugin_dirs = ['/o']\n"}, []string{"/o"}, ""},
		"cri-dockerd":          {"cri-dockerd", []string{"--cni-bin-dir=/d"}, nil, []string{"/d"}, ""},
		"cri-dockerd, no flag": {"cri-dockerd", nil, nil, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			conf, err := process(t, test.runtime, test.args, test.root).Configured()
			got := conf.BinDirs
			if !slices.Equal(got, test.want) || (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("%q, %v; want %q, %q", got, err, test.want, test.err)
			}
		})
	}
}

func TestConfiguredNetDir(t *testing.T) {
	for name, r := range map[string]Runtime{
		"containerd": process(t, "containerd", nil, files{"etc/containerd/config.toml": "imports = ['more.toml']\n[plugins.cri.cni]\nconf_dir = '/old'\n",
			"etc/containerd/more.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nconf_dir = '/net'\n"}),
		"CRI-O": process(t, "crio", nil, files{"etc/crio/crio.conf": "[crio.network]\nnetwork_dir = '/old'\n",
			"etc/crio/crio.conf.d/10-x": "[crio.network]\nnetwork_dir = '/net'\n"}),
		"CRI-O, flag": process(t, "crio", []string{"--cni-config-dir=/net"}, nil),
		"cri-dockerd": process(t, "cri-dockerd", []string{"--cni-conf-dir", "/net"}, nil),
	} {
		if conf, err := r.Configured(); err != nil || conf.NetDir != "/net" {
			t.Errorf("%s: %+v, %v", name, conf, err)
		}
	}
}

// containerd 2 merges sections that containerd 1 replaces.
func TestContainerdMerges(t *testing.T) {
	for version, want := range map[string][]string{"v1.7.27": nil, "": nil, "v2.0.0": {"/v2"}} {
		r := process(t, "containerd", nil, files{
			"etc/containerd/config.toml": "version = 2\nimports = ['more.toml']\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/v2'\n",
			"etc/containerd/more.toml":   "[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'x'\n",
		})
		r.Version = version
		if conf, err := r.Configured(); err != nil || !slices.Equal(conf.BinDirs, want) {
			t.Errorf("%s: %+v, %v; want %q", version, conf, err, want)
		}
	}
}
