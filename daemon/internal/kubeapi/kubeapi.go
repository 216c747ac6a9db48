// Package kubeapi creates clients for the API server. Each knows a single API group, because all of client-go's would make the daemon
// much larger.
package kubeapi

import (
	"cmp"
	"errors"
	"fmt"
	"os"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Config reads a kubeconfig file, or returns the in-cluster configuration if kubeconfig is empty.
func Config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		return rest.InClusterConfig()
	}
	return clientcmd.BuildConfigFromFlags("", kubeconfig)
}

// ConfigError names the flag that an error about kubectl's configuration is about, and what the command can read instead.
func ConfigError(err error, instead string) error {
	var path *os.PathError
	switch {
	case clientcmd.IsEmptyConfig(err):
		return fmt.Errorf("no kubeconfig: name one with --kubeconfig%s", instead)
	case errors.As(err, &path):
		return fmt.Errorf("--kubeconfig: %w", err)
	}
	return err
}

// Core returns a client for the core group.
func Core(config *rest.Config) (rest.Interface, error) {
	return client(config, "/api", corev1.SchemeGroupVersion, corev1.AddToScheme)
}

// Apps returns a client for the apps group.
func Apps(config *rest.Config) (rest.Interface, error) {
	return client(config, "/apis", appsv1.SchemeGroupVersion, appsv1.AddToScheme)
}

func client(config *rest.Config, path string, version schema.GroupVersion, add func(*runtime.Scheme) error) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	if err := add(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, version)
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = path, &version
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.UserAgent = cmp.Or(config.UserAgent, "probeletd")
	return rest.RESTClientFor(config)
}
