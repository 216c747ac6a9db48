// Package kubelet asks the HTTP server of this node's kubelet.
package kubelet

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
)

// Config says how to ask the kubelet.
type Config struct {
	URL string // http://HOST:PORT/PATH or https://HOST:PORT/PATH
	// TokenFile and CAFile are read for each request, as both are renewed. They are for https only; empty: no token, and
	// the system's authorities.
	TokenFile, CAFile string
	// ServerName is the name in the kubelet's certificate; empty: the host of the URL.
	ServerName string
	// SelfSigned returns the certificate, in PEM, that the kubelet made for itself if it was given none, as it does unless
	// told otherwise (cmd/kubelet/app/server.go, initializeTLS). It is trusted besides what CAFile vouches for. May be nil.
	SelfSigned func() ([]byte, error)
}

// At returns the configuration for another path of the same server.
func (c Config) At(path string) (Config, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return c, err
	}
	c.URL = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: path}).String()
	return c, nil
}

// Client gets one URL, over connections of its own.
type Client struct {
	config Config
	client *http.Client
	ca     []byte // that client trusts
}

// New checks the configuration; it does not connect.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%q: must be http://HOST:PORT/PATH or https://HOST:PORT/PATH", c.URL)
	}
	c.ServerName = cmp.Or(c.ServerName, u.Hostname())
	if u.Scheme == "http" {
		c.TokenFile, c.CAFile = "", "" // anyone on the way would read the token
	}
	return &Client{config: c}, nil
}

// Error is a failure to get an answer of status 200.
type Error struct {
	Kind string // of failure, as it is logged: the same from one attempt to the next
	Err  error  // what happened this time
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Unreachable is the kind of a failure to connect, or to get a whole answer in time.
const Unreachable = "is not reachable"

// Get returns an answer of status 200, whose body the caller closes; its error is an *Error.
func (c *Client) Get(ctx context.Context, accept string) (*http.Response, error) {
	request, err := c.request(ctx, accept)
	if err != nil {
		return nil, &Error{"cannot be asked", err}
	}
	response, err := c.client.Do(request)
	if err != nil {
		return nil, &Error{Unreachable, err}
	}
	if response.StatusCode != http.StatusOK {
		_ = response.Body.Close()
		return nil, &Error{"refuses: " + response.Status, errors.New(response.Status)}
	}
	return response, nil
}

func (c *Client) request(ctx context.Context, accept string) (*http.Request, error) {
	if err := c.prepare(); err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.config.URL, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", accept)
	request.Header.Set("User-Agent", "probeletd")
	if c.config.TokenFile != "" {
		token, err := os.ReadFile(c.config.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	}
	return request, nil
}

// prepare makes an HTTP client, and a new one when the authority has changed.
func (c *Client) prepare() error {
	var ca []byte
	var pool *x509.CertPool
	if c.config.CAFile != "" {
		var err error
		if ca, err = os.ReadFile(c.config.CAFile); err != nil {
			return fmt.Errorf("CA: %w", err)
		}
		if pool = x509.NewCertPool(); !pool.AppendCertsFromPEM(ca) {
			return fmt.Errorf("CA: %s: no certificate in it", c.config.CAFile)
		}
	}
	if c.client != nil && bytes.Equal(ca, c.ca) {
		return nil
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	c.ca = ca
	c.client = &http.Client{
		Transport: &http.Transport{ // no proxy: it is this node
			TLSClientConfig: &tls.Config{
				ServerName: c.config.ServerName, MinVersion: tls.VersionTLS12,
				InsecureSkipVerify: true, // verify does it
				VerifyConnection:   func(s tls.ConnectionState) error { return c.verify(s, pool) },
			},
		},
		// Nothing elsewhere is the kubelet, and our token is not for it.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

// verify accepts what package tls accepts, and the certificate that the kubelet of this node made for itself: that one
// names neither an address nor an authority that we know.
func (c *Client) verify(s tls.ConnectionState, roots *x509.CertPool) error {
	intermediates := x509.NewCertPool()
	for _, certificate := range s.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, DNSName: c.config.ServerName})
	if err == nil || c.config.SelfSigned == nil {
		return err
	}
	text, readErr := c.config.SelfSigned()
	if readErr != nil {
		return fmt.Errorf("%w (and the certificate that the kubelet made for itself is not known: %w)", err, readErr)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" && bytes.Equal(block.Bytes, s.PeerCertificates[0].Raw) {
			return nil
		}
	}
	return fmt.Errorf("%w (and it is not the certificate that the kubelet made for itself)", err)
}
